"""XMP packets, which tell in a picture's file where it comes from: read, written, and added to (sans-IO).

The IPTC's `DigitalSourceType` in a packet says that a model made the picture. What is in a packet already stays as it
is, byte for byte. Packets are hostile: one with a document type is refused, so that it has no entities.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Final
from xml.parsers import expat

from prefect_ttapi.errors import PictureError

#: What the packet says, in the IPTC's words.
GENERATED: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

#: The IPTC's words for pictures that a model, or another algorithm, made all or a part of.
_SYNTHETIC: Final = re.compile(
    r"https?://cv\.iptc\.org/newscodes/digitalsourcetype/"
    "(trainedAlgorithmicMedia|compositeWithTrainedAlgorithmicMedia|compositeSynthetic|algorithmicMedia)"
)

_RDF: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_NAMESPACES: Final = {
    "ttapi": "urn:prefect-ttapi:1.0:",
    "rdf": _RDF,
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "stRef": "http://ns.adobe.com/xap/1.0/sType/ResourceRef#",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
}
_SOURCE_TYPE: Final = "Iptc4xmpExt:DigitalSourceType"
_DERIVED_FROM: Final = "xmpMM:DerivedFrom"
_PROMPT: Final = "Iptc4xmpExt:AIPromptInformation"
_REQUEST_HASH: Final = "ttapi:RequestHash"
_SOURCE_SHA256: Final = "ttapi:SourceSHA256"
_PARSE_TYPE: Final = _RDF + "parseType"
_SHA256: Final = re.compile("[0-9a-f]{64}")

#: A packet before and after its properties.
_BEFORE: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
    f'<rdf:RDF xmlns:rdf="{_RDF}">\n'
).encode()
_AFTER: Final = b'</rdf:RDF>\n</x:xmpmeta>\n<?xpacket end="w"?>'

#: A packet without properties.
EMPTY: Final = _BEFORE + _AFTER

#: Our own properties, also in a packet that has others.
_OPENING: Final = "<rdf:Description " + " ".join(
    f'xmlns:{name}="{uri}"' for name, uri in _NAMESPACES.items() if name != "xmpNote"
)
_OURS: Final = re.compile(re.escape(_OPENING.encode()) + rb".*?</rdf:Description>\n", re.DOTALL)

#: What XML can't hold.
_ILLEGAL: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

#: Characters of a prompt that are told: whatever they are, a JPEG's segment has room for them.
_LONGEST_PROMPT: Final = 10_000


@dataclass(frozen=True)
class Statement:
    """The facts that this package tells of a picture in its file.

    Attributes:
        model: the model that made the picture.
        request_hash: the hash of the request that was paid for.
        source_sha256: the digest of the stored image that the file is a copy or a rendition of.
        prompt: the prompt, if the file is to tell it.
    """

    model: str
    request_hash: str
    source_sha256: str
    prompt: str | None = None


class Packet:
    """An XMP packet, and what it says; nobody vouches for it.

    Attributes:
        properties: texts by namespace and name in one; of a nested property, all its texts in a row.

    >>> statement = Statement("dall-e-3", request_hash="ab" * 32, source_sha256="cd" * 32)
    >>> packet = Packet(EMPTY).with_statement(statement)
    >>> Packet(packet).generated, Packet(packet).source_sha256 == "cd" * 32, without_statement(packet)
    (True, True, None)

    Raises:
        PictureError: it is no XML, or XML with a document type.
    """

    def __init__(self, packet: bytes) -> None:
        self._packet = packet
        self._path: list[str] = []
        self._text: list[str] = []
        self._top: int | None = None  # how deep properties are, within a description
        self._end: int | None = None  # of the descriptions
        self._parser = expat.ParserCreate(None, "")
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._stop
        self._parser.CharacterDataHandler = self._text.append
        self.properties: dict[str, str] = {}
        try:
            self._parser.Parse(packet.rstrip(b"\0"), True)
        except (expat.ExpatError, ValueError) as error:
            raise PictureError(f"its XMP packet can't be read: {error}") from None

    def __getitem__(self, name: str) -> str | None:
        prefix, _, local = name.partition(":")
        return self.properties.get(_NAMESPACES[prefix] + local)

    @property
    def generated(self) -> bool:
        """Return whether it says that a model made the picture."""
        return _SYNTHETIC.fullmatch(self[_SOURCE_TYPE] or "") is not None

    @property
    def tells_prompt(self) -> bool:
        """Return whether it says which prompt the model had."""
        return bool(self[_PROMPT])

    @property
    def request_hash(self) -> str | None:
        """Return the hash of the request that the picture answers, if it says so."""
        return self[_REQUEST_HASH]

    @property
    def source_sha256(self) -> str | None:
        """Return the digest of the image that the picture is a copy or a rendition of, if it says so."""
        return self[_SOURCE_SHA256] or next(iter(_SHA256.findall(self[_DERIVED_FROM] or "")), None)

    def with_statement(self, statement: Statement) -> bytes:
        """Return the packet with what the statement says and it doesn't.

        Raises:
            PictureError: it has no place for it, or says that something else than a model made the picture.
        """
        if self._end is None or self._packet[self._end : self._end + 2] != b"</":
            raise PictureError("its XMP packet can't be added to: it has no place for properties")
        before, after = self._packet[: self._end], self._packet[self._end :]
        packet = before + self._added(statement) + after
        if not Packet(packet).generated:
            raise PictureError(
                f"its XMP packet can't be added to: its source type is {(self[_SOURCE_TYPE] or '')[:200]!a}"
            )
        return packet

    def _added(self, statement: Statement) -> bytes:
        prompt = statement.prompt and _ILLEGAL.sub("\ufffd", statement.prompt)[:_LONGEST_PROMPT]
        told = {
            _SOURCE_TYPE: GENERATED,
            "Iptc4xmpExt:AISystemUsed": statement.model,
            _PROMPT: prompt,
            "xmp:CreatorTool": statement.model,
            _DERIVED_FROM: f"sha256:{statement.source_sha256}",
            _REQUEST_HASH: statement.request_hash,
            _SOURCE_SHA256: statement.source_sha256,
        }
        lines = [_line(name, text) for name, text in told.items() if text and self[name] is None]
        return f'{_OPENING} rdf:about="">\n{"".join(lines)}</rdf:Description>\n'.encode()

    def _refuse(self, *_: object) -> None:
        raise ValueError("it has a document type")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._top is None:
            if name == _RDF + "Description" and self._path[-1:] == [_RDF + "RDF"]:
                self._top = len(self._path) + 1
                self.properties |= attributes
        else:
            if len(self._path) == self._top:
                self._text.clear()
            self._text += (text for kind, text in attributes.items() if kind != _PARSE_TYPE)
        self._path.append(name)

    def _stop(self, name: str) -> None:
        self._path.pop()
        if len(self._path) == self._top:
            self.properties[name] = "".join(self._text).strip()
        elif self._top is not None and len(self._path) < self._top:
            self._top = None
        if name == _RDF + "RDF":
            self._end = self._parser.CurrentByteIndex


def without_statement(packet: bytes) -> bytes | None:
    """Return a packet without what `with_statement` put there; None where nothing else is in it."""
    rest = _OURS.sub(b"", packet)
    return None if rest == EMPTY else rest


def _line(name: str, text: str) -> str:
    told = html.escape(text)
    if name == _DERIVED_FROM:
        told = f"<stRef:documentID>{told}</stRef:documentID>"
        return f'  <{name} rdf:parseType="Resource">{told}</{name}>\n'
    return f"  <{name}>{told}</{name}>\n"
