"""Labels in a picture's file that say where it comes from: read, inserted, and taken out again (sans-IO).

There are two kinds. Content Credentials (C2PA) are signed: here they are only found. An XMP packet is plain text that
says that a model made the picture. Nothing is decoded or encoded: an inserted label is a chunk or a segment of the
file, and all other bytes stay as they are. PNG, JPEG and WebP are read. Files are hostile: what is read has a limit.
"""

from __future__ import annotations

import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, Final, Literal, NamedTuple

from prefect_ttapi.errors import PictureError
from prefect_ttapi.images.headers import (
    WEBP_PICTURES,
    NotAnImage,
    Part,
    bytes_at,
    jpeg_parts,
    media_type_of,
    png_parts,
    webp_end,
    webp_parts,
    webp_picture_size,
)
from prefect_ttapi.images.xmp import EMPTY, Packet, Statement, without_statement

#: The marks of a file: Content Credentials, XMP that says that a model made the picture, the prompt in that XMP.
Mark = Literal["credentials", "xmp", "prompt"]

_LARGEST_PACKET: Final = 1024 * 1024
_LONGEST_SEGMENT: Final = 65_533
_MOST_PARTS: Final = 100_000
_BLOCK: Final = 256 * 1024

#: A box that holds a C2PA manifest store: its length, its type, its description's length and type, and that one's UUID.
_STORE: Final = re.compile(
    rb"(....)jumb....jumdc2pa\x00\x11\x00\x10\x80\x00\x00\xaa\x00\x38\x9b\x71", re.DOTALL
)
_STORE_HEAD: Final = 32
_BOX_HEAD: Final = 8

_PNG_BODY: Final = 33

_WEBP_XMP: Final = 0x04
_WEBP_ALPHA: Final = 0x10


@dataclass(frozen=True)
class Labels:
    """The origin of a picture as its file tells it; nobody vouches for it.

    Attributes:
        marks: the file's marks; Content Credentials count whether or not they are valid.
        request_hash, source_sha256: as in `Statement`, if the file's XMP has them.
        xmp: the file's packet, if it can be read.
        credentials_size: the number of bytes that hold credentials, or claim to.
    """

    marks: tuple[Mark, ...] = ()
    request_hash: str | None = None
    source_sha256: str | None = None
    xmp: bytes | None = None
    credentials_size: int = 0


def read_labels(file: BinaryIO) -> Labels | None:
    """Return what the image in `file` says of its origin; None if it is of a kind that is not read here.

    >>> import io
    >>> read_labels(io.BytesIO(b"GIF89a")) is None
    True
    """
    picture = _opened(file)
    if picture is None:
        return None
    _, xmp = picture.packet() or (None, None)
    try:
        packet = Packet(xmp or EMPTY)
        if extension := packet["xmpNote:HasExtendedXMP"]:
            packet.properties = Packet(picture.more(extension) or EMPTY).properties | packet.properties
    except PictureError:
        xmp, packet = None, Packet(EMPTY)
    marks: dict[Mark, bool] = {
        "credentials": picture.has_credentials(),
        "xmp": packet.generated,
        "prompt": packet.tells_prompt,
    }
    return Labels(
        tuple(mark for mark, there in marks.items() if there),
        packet.request_hash,
        packet.source_sha256,
        xmp,
        picture.credentials_size,
    )


def mark(file: BinaryIO, statement: Statement, packet: bytes | None = None) -> Iterator[bytes]:
    """Return the bytes of the image in `file` with an XMP packet that says that a model made it.

    What stands in a packet already stays, and is not said twice. Must come before signing: it ends the validity of
    Content Credentials in the file.

    Args:
        packet: the packet to add to, such as that of the image that a rendition was made of; by default the file's own.

    Raises:
        PictureError: the file is of a kind that can't be marked, or its packet can't be added to.
    """
    picture = _opened(file)
    if picture is None:
        raise PictureError("the image can't be marked: it is neither PNG nor JPEG nor WebP")
    part, own = picture.packet() or (None, EMPTY)
    known = packet or own
    if known is None:
        raise PictureError("the image can't be marked: its XMP packet is too large, or damaged")
    return _spliced(file, picture.put(part, Packet(known).with_statement(statement)))


def unmark(file: BinaryIO) -> Iterator[bytes]:
    """Return the bytes of the image in `file` without what `mark` put there."""
    picture = _opened(file)
    part, packet = (picture and picture.packet()) or (None, None)
    rest = packet and without_statement(packet)
    if picture is None or part is None or rest == packet:
        return _spliced(file, [])
    return _spliced(file, picture.put(part, rest))


class _Splice(NamedTuple):
    """Bytes that take the place of those from `start` to `end`."""

    start: int
    end: int
    data: bytes

    @property
    def growth(self) -> int:
        return len(self.data) - (self.end - self.start)


def _spliced(file: BinaryIO, splices: Iterable[_Splice]) -> Iterator[bytes]:
    position = 0
    for splice in sorted(splices):
        yield from _between(file, position, splice.start)
        yield splice.data
        position = splice.end
    file.seek(position)
    while block := file.read(_BLOCK):
        yield block


def _between(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end and (block := file.read(min(_BLOCK, end - start))):
        start += len(block)
        yield block


class _Picture(ABC):
    """A picture's file, as its parts."""

    #: How its parts are found.
    walk: staticmethod[[BinaryIO], Iterator[Part]]
    #: Kinds of parts that matter here, and those of them that hold credentials, and a packet behind this head.
    matter: frozenset[bytes]
    holds_credentials: bytes
    holds_packet: bytes
    head: bytes = b""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.parts: list[Part] = []
        with suppress(NotAnImage):  # what comes before the damage counts
            for part in islice(self.walk(file), _MOST_PARTS):
                if part.kind in self.matter:
                    self.parts.append(part)

    @property
    def credentials_size(self) -> int:
        """Return how many bytes there are of the kind that holds credentials."""
        return sum(part.size for part in self._of(self.holds_credentials))

    def has_credentials(self) -> bool:
        """Return whether there is a C2PA manifest store, as a whole."""
        return any(0 < self._store_size(part) <= part.size for part in self._of(self.holds_credentials))

    def packet(self) -> tuple[Part, bytes | None] | None:
        """Return where an XMP packet is, and the packet; None in its place where it is too large, or damaged."""
        named = (part for part in self._of(self.holds_packet) if self._starts_with(part, self.head))
        return next(((part, self._packet_in(part)) for part in named), None)

    def more(self, guid: str) -> bytes | None:
        """Return the rest of the packet, which other parts hold under this name."""
        del guid
        return None

    def put(self, part: Part | None, packet: bytes | None) -> list[_Splice]:
        """Return the splices that put a packet into the place of `part`, or into a new one; None takes it out."""
        start, end = (part.start, part.end) if part else (self._begin(), self._begin())
        return [_Splice(start, end, b"" if packet is None else self._encoded(packet))]

    @abstractmethod
    def _begin(self) -> int:
        """Return where a new packet goes."""

    @abstractmethod
    def _encoded(self, packet: bytes) -> bytes:
        """Return the part that holds a packet."""

    def _of(self, *kinds: bytes) -> list[Part]:
        return [part for part in self.parts if part.kind in kinds]

    def _read(self, part: Part, size: int) -> bytes:
        return bytes_at(self.file, part.body, min(size, part.size))

    def _starts_with(self, part: Part, head: bytes) -> bool:
        return self._read(part, len(head)) == head

    def _packet_in(self, part: Part) -> bytes | None:
        return self._read(part, part.size)[len(self.head) :] if part.size <= _LARGEST_PACKET else None

    def _store_size(self, part: Part, start: int = 0) -> int:
        """Return the length of the manifest store that begins in a part; 0 where none does."""
        head = _STORE.match(self._read(part, start + _STORE_HEAD), start)
        return int.from_bytes(head[1]) if head else 0


class _Png(_Picture):
    walk = staticmethod(png_parts)
    matter = frozenset({b"caBX", b"iTXt"})
    holds_credentials = b"caBX"
    holds_packet = b"iTXt"
    head = b"XML:com.adobe.xmp\0"

    def _packet_in(self, part: Part) -> bytes | None:
        rest = super()._packet_in(part)
        if rest is None:
            return None
        text = rest[2:].split(b"\0", 2)[-1]  # after two names in languages
        if rest[:1] == b"\0":
            return text
        try:
            unpacked = zlib.decompressobj().decompress(text, _LARGEST_PACKET + 1)
        except zlib.error:
            return None
        return unpacked if len(unpacked) <= _LARGEST_PACKET else None

    def _begin(self) -> int:
        return _PNG_BODY

    def _encoded(self, packet: bytes) -> bytes:
        body = b"iTXt" + self.head + b"\0\0\0\0" + packet
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


class _Jpeg(_Picture):
    walk = staticmethod(jpeg_parts)
    matter = frozenset({b"\xe0", b"\xe1", b"\xeb"})
    holds_credentials = b"\xeb"
    holds_packet = b"\xe1"
    head = b"http://ns.adobe.com/xap/1.0/\0"

    def has_credentials(self) -> bool:
        # bytes of a store that are still to come, in pieces that repeat its head
        wanted: dict[bytes, int] = {}
        for part in self._of(b"\xeb"):
            magic, box, number = struct.unpack("2s2s4s", self._read(part, 8).ljust(8))
            if magic != b"JP":
                continue
            if int.from_bytes(number) == 1:
                wanted[box] = self._store_size(part, 8) - _BOX_HEAD
            if wanted.get(box, 0) > 0:
                wanted[box] -= part.size - 8 - _BOX_HEAD
                if wanted[box] <= 0:
                    return True
        return False

    def more(self, guid: str) -> bytes | None:
        begin = b"http://ns.adobe.com/xmp/extension/\0" + guid.encode()
        head = len(begin) + 8  # its length in all, and where this piece belongs
        pieces: dict[int, bytes] = {}
        for part in self._of(b"\xe1"):
            piece = self._read(part, part.size)
            if piece.startswith(begin) and sum(map(len, pieces.values())) <= _LARGEST_PACKET:
                pieces[int.from_bytes(piece[head - 4 : head])] = piece[head:]
        return b"".join(pieces[at] for at in sorted(pieces)) or None

    def _begin(self) -> int:
        """Return where the segments end that must come first."""
        position = 2
        for part in self.parts:
            is_first = part.kind == b"\xe0" or self._starts_with(part, b"Exif")
            if part.start != position or not is_first:
                break
            position = part.end
        return position

    def _encoded(self, packet: bytes) -> bytes:
        body = self.head + packet
        if len(body) > _LONGEST_SEGMENT:
            raise PictureError(
                f"its XMP packet would be {len(packet):,} bytes, more than a JPEG has room for"
            )
        return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


class _Webp(_Picture):
    walk = staticmethod(webp_parts)
    matter = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ANMF", b"ALPH", b"ICCP", b"EXIF", b"XMP ", b"C2PA"})
    holds_credentials = b"C2PA"
    holds_packet = b"XMP "

    def put(self, part: Part | None, packet: bytes | None) -> list[_Splice]:
        splices = super().put(part, packet) + self._header(packet is not None)
        if part is None and self._begin() % 2:  # some leave out the last chunk's padding
            splices.append(_Splice(self._begin(), self._begin(), b"\0"))
        size = self._begin() - 8 + sum(splice.growth for splice in splices)
        return [*splices, _Splice(4, 8, struct.pack("<I", size))]

    def _begin(self) -> int:
        return webp_end(self.file)

    def _encoded(self, packet: bytes) -> bytes:
        return _chunk(b"XMP ", packet)

    def _header(self, has_packet: bool) -> list[_Splice]:
        """Return the splices that make the header say whether there is a packet; a file that needs none gets none."""
        header = next(iter(self._of(b"VP8X")), None)
        if header is None:
            return [_Splice(12, 12, _chunk(b"VP8X", self._plain_header()))]
        said = self._read(header, header.size)
        needed = {part.kind for part in self.parts} - {b"VP8X", b"XMP "} - WEBP_PICTURES
        if not has_packet and not needed and said == self._plain_header():
            return [_Splice(header.start, header.end, b"")]
        flags = said[0] | _WEBP_XMP if has_packet else said[0] & ~_WEBP_XMP
        return [_Splice(header.body, header.body + 1, bytes([flags]))]

    def _plain_header(self) -> bytes:
        """Return the header of a file that has a picture and a packet, and nothing else."""
        picture = next(iter(self._of(*WEBP_PICTURES)), None)
        if picture is None:
            raise PictureError("the WebP has no picture")
        width, height = webp_picture_size(self.file, picture)
        has_alpha = picture.kind == b"VP8L" and self._read(picture, 5)[4] & 0x10
        flags = _WEBP_XMP | (_WEBP_ALPHA if has_alpha else 0)
        return (
            struct.pack("<I", flags) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


_KINDS: Final[Mapping[str, type[_Picture]]] = {"image/png": _Png, "image/jpeg": _Jpeg, "image/webp": _Webp}


def _opened(file: BinaryIO) -> _Picture | None:
    kind = _KINDS.get(media_type_of(bytes_at(file, 0, 12)) or "")
    return kind(file) if kind else None
