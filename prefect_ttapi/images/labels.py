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
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, Final, Literal, NamedTuple

from prefect_ttapi.errors import PictureError
from prefect_ttapi.images.headers import media_type_of, vp8_size, vp8l_size
from prefect_ttapi.images.xmp import EMPTY, Packet, Statement, without_statement

#: What a file has: Content Credentials, XMP that says that a model made the picture, the prompt in that.
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

_PNG_XMP: Final = b"XML:com.adobe.xmp\0"
_JPEG_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_MORE_XMP: Final = b"http://ns.adobe.com/xmp/extension/\0"
_JPEG_BARE: Final = frozenset({0x01, *range(0xD0, 0xD8)})
_JPEG_PICTURE: Final = frozenset({0x00, 0xD8, 0xD9, 0xDA})
_WEBP_XMP: Final = 0x04
_WEBP_ALPHA: Final = 0x10


@dataclass(frozen=True)
class Labels:
    """What a file says of where it comes from; nobody vouches for it.

    Attributes:
        credentials: it has Content Credentials, whether or not they are valid.
        generated: its XMP says that a model made it.
        tells_prompt: its XMP has the prompt.
        request_hash, source_sha256: as in `Statement`, where its XMP has them.
        xmp: its packet, where it can be read.
        credentials_size: bytes that hold credentials, or claim to.
    """

    credentials: bool = False
    generated: bool = False
    tells_prompt: bool = False
    request_hash: str | None = None
    source_sha256: str | None = None
    xmp: bytes | None = None
    credentials_size: int = 0

    @property
    def marks(self) -> tuple[Mark, ...]:
        """The same in a word each."""
        known: dict[Mark, bool] = {
            "credentials": self.credentials,
            "xmp": self.generated,
            "prompt": self.tells_prompt,
        }
        return tuple(mark for mark, there in known.items() if there)


def read_labels(file: BinaryIO) -> Labels | None:
    """Return what the image in `file` says of where it comes from; None where it is of a kind that is not read here.

    >>> import io
    >>> read_labels(io.BytesIO(b"GIF89a")) is None
    True
    """
    picture = _opened(file)
    if picture is None:
        return None
    credentials, size, found = picture.has_credentials(), picture.credentials_size, picture.packet()
    try:
        packet = Packet((found and found[1]) or b"")
        rest = Packet((packet.extension and picture.more(packet.extension)) or EMPTY)
    except PictureError:
        return Labels(credentials, credentials_size=size)
    return Labels(
        credentials,
        generated=packet.generated or rest.generated,
        tells_prompt=packet.tells_prompt or rest.tells_prompt,
        request_hash=packet.request_hash or rest.request_hash,
        source_sha256=packet.source_sha256 or rest.source_sha256,
        xmp=found and found[1],
        credentials_size=size,
    )


def mark(file: BinaryIO, statement: Statement, packet: bytes | None = None) -> Iterator[bytes]:
    """Return the bytes of the image in `file` with an XMP packet that says that a model made it.

    What stands in a packet already stays, and is not said twice. Must come before signing: it ends the validity of
    Content Credentials in the file.

    Args:
        packet: what the file's packet is to hold, too, such as that of the image that a rendition was made of; by
            default the file's own.

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


class _Part(NamedTuple):
    """A chunk or a segment of a file: where it begins and ends, and where its contents do."""

    kind: bytes
    start: int
    body: int
    size: int
    end: int


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


def _at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


class _Picture(ABC):
    """A picture's file, as its parts."""

    #: Kinds of parts that matter here, and the one that holds credentials.
    matter: frozenset[bytes]
    holds_credentials: bytes

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.parts = [part for part in islice(self._walk(), _MOST_PARTS) if part.kind in self.matter]

    @abstractmethod
    def _walk(self) -> Iterator[_Part]:
        """Yield the file's parts."""

    @property
    def credentials_size(self) -> int:
        """Return how many bytes there are of the kind that holds credentials."""
        return sum(part.size for part in self._of(self.holds_credentials))

    @abstractmethod
    def has_credentials(self) -> bool:
        """Return whether there is a C2PA manifest store, as a whole."""

    @abstractmethod
    def packet(self) -> tuple[_Part, bytes | None] | None:
        """Return where an XMP packet is, and the packet; None in its place where it is too large, or damaged."""

    def more(self, guid: str) -> bytes | None:
        """Return what the packet has left for other places, under this name."""
        del guid
        return None

    @abstractmethod
    def put(self, part: _Part | None, packet: bytes | None) -> list[_Splice]:
        """Return what puts a packet into the place of `part`, or into a new one; None takes it out."""

    def _of(self, *kinds: bytes) -> list[_Part]:
        return [part for part in self.parts if part.kind in kinds]

    def _read(self, part: _Part, size: int) -> bytes:
        return _at(self.file, part.body, min(size, part.size))

    def _store_size(self, part: _Part, start: int = 0) -> int:
        """Return the length of the manifest store that begins in a part; 0 where none does."""
        head = _STORE.match(self._read(part, start + _STORE_HEAD), start)
        return int.from_bytes(head[1]) if head else 0


class _Png(_Picture):
    matter = frozenset({b"caBX", b"iTXt"})
    holds_credentials = b"caBX"

    def _walk(self) -> Iterator[_Part]:
        position = 8
        while len(head := _at(self.file, position, 8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            yield _Part(kind, position, position + 8, size, position + size + 12)
            position += size + 12

    def has_credentials(self) -> bool:
        return any(0 < self._store_size(part) <= part.size for part in self._of(b"caBX"))

    def packet(self) -> tuple[_Part, bytes | None] | None:
        named = (part for part in self._of(b"iTXt") if self._read(part, len(_PNG_XMP)) == _PNG_XMP)
        return next(((part, self._text(part)) for part in named), None)

    def _text(self, part: _Part) -> bytes | None:
        if part.size > _LARGEST_PACKET:
            return None
        rest = self._read(part, part.size)[len(_PNG_XMP) :]
        text = rest[2:].split(b"\0", 2)[-1]  # after two names in languages
        if rest[:1] == b"\0":
            return text
        try:
            unpacked = zlib.decompressobj().decompress(text, _LARGEST_PACKET + 1)
        except zlib.error:
            return None
        return unpacked if len(unpacked) <= _LARGEST_PACKET else None

    def put(self, part: _Part | None, packet: bytes | None) -> list[_Splice]:
        place = (part.start, part.end) if part else (_PNG_BODY, _PNG_BODY)
        if packet is None:
            return [_Splice(*place, b"")]
        body = b"iTXt" + _PNG_XMP + b"\0\0\0\0" + packet
        return [
            _Splice(*place, struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
        ]


class _Jpeg(_Picture):
    matter = frozenset({b"\xe0", b"\xe1", b"\xeb"})
    holds_credentials = b"\xeb"

    def _walk(self) -> Iterator[_Part]:
        position = 2
        for _ in range(_MOST_PARTS):
            head = _at(self.file, position, 4)
            if len(head) < 4 or head[0] != 0xFF or head[1] in _JPEG_PICTURE:
                return
            if head[1] == 0xFF:  # filling
                position += 1
            elif head[1] in _JPEG_BARE:
                position += 2
            else:
                size = int.from_bytes(head[2:])
                yield _Part(head[1:2], position, position + 4, max(0, size - 2), position + 2 + size)
                position += 2 + size

    def has_credentials(self) -> bool:
        wanted: dict[
            bytes, int
        ] = {}  # bytes of a store that are still to come, in pieces that repeat its head
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

    def packet(self) -> tuple[_Part, bytes | None] | None:
        named = (part for part in self._of(b"\xe1") if self._read(part, len(_JPEG_XMP)) == _JPEG_XMP)
        return next(((part, self._read(part, part.size)[len(_JPEG_XMP) :]) for part in named), None)

    def more(self, guid: str) -> bytes | None:
        begin = _JPEG_MORE_XMP + guid.encode()
        head = len(begin) + 8  # its length in all, and where this piece belongs
        pieces: dict[int, bytes] = {}
        for part in self._of(b"\xe1"):
            piece = self._read(part, part.size)
            if piece.startswith(begin) and sum(map(len, pieces.values())) <= _LARGEST_PACKET:
                pieces[int.from_bytes(piece[head - 4 : head])] = piece[head:]
        return b"".join(pieces[at] for at in sorted(pieces)) or None

    def put(self, part: _Part | None, packet: bytes | None) -> list[_Splice]:
        if packet is None:
            return [_Splice(part.start, part.end, b"")] if part else []
        body = _JPEG_XMP + packet
        if len(body) > _LONGEST_SEGMENT:
            raise PictureError(
                f"its XMP packet would be {len(packet):,} bytes, more than a JPEG has room for"
            )
        place = (part.start, part.end) if part else (self._begin(), self._begin())
        return [_Splice(*place, b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)]

    def _begin(self) -> int:
        """Return where the segments end that must come first."""
        position = 2
        for part in self.parts:
            is_first = part.kind == b"\xe0" or self._read(part, 4) == b"Exif"
            if part.start != position or not is_first:
                break
            position = part.end
        return position


class _Webp(_Picture):
    matter = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ANMF", b"ALPH", b"ICCP", b"EXIF", b"XMP ", b"C2PA"})
    holds_credentials = b"C2PA"

    def _walk(self) -> Iterator[_Part]:
        position = 12
        while position + 8 <= self._end and len(head := _at(self.file, position, 8)) == 8:
            kind, size = struct.unpack("<4sI", head)
            yield _Part(kind, position, position + 8, size, position + 8 + size + size % 2)
            position += 8 + size + size % 2

    @property
    def _end(self) -> int:
        return 8 + int.from_bytes(_at(self.file, 4, 4), "little")

    def has_credentials(self) -> bool:
        return any(0 < self._store_size(part) <= part.size for part in self._of(b"C2PA"))

    def packet(self) -> tuple[_Part, bytes | None] | None:
        found = next(iter(self._of(b"XMP ")), None)
        if found is None:
            return None
        return found, self._read(found, found.size) if found.size <= _LARGEST_PACKET else None

    def put(self, part: _Part | None, packet: bytes | None) -> list[_Splice]:
        chunk = b"" if packet is None else _chunk(b"XMP ", packet)
        odd = b"\0" * (self._end % 2)  # some leave out the last chunk's padding
        splices = [
            _Splice(part.start, part.end, chunk) if part else _Splice(self._end, self._end, odd + chunk)
        ]
        splices += self._header(packet is not None)
        size = self._end - 8 + sum(splice.growth for splice in splices)
        return [*splices, _Splice(4, 8, struct.pack("<I", size))]

    def _header(self, has_packet: bool) -> list[_Splice]:
        """Return what makes the header say whether there is a packet; a file that needs none has none."""
        header = next(iter(self._of(b"VP8X")), None)
        if header is None:
            return [_Splice(12, 12, _chunk(b"VP8X", self._plain_header()))]
        said = self._read(header, header.size)
        needed = {part.kind for part in self.parts} - {b"VP8X", b"XMP ", b"VP8 ", b"VP8L"}
        if not has_packet and not needed and said == self._plain_header():
            return [_Splice(header.start, header.end, b"")]
        flags = said[0] | _WEBP_XMP if has_packet else said[0] & ~_WEBP_XMP
        return [_Splice(header.body, header.body + 1, bytes([flags]))]

    def _plain_header(self) -> bytes:
        """Return the header of a file that has a picture and a packet, and nothing else."""
        picture = next(iter(self._of(b"VP8 ", b"VP8L")), None)
        if picture is None:
            raise PictureError("the WebP has no picture")
        self.file.seek(picture.body)
        width, height = (vp8l_size if picture.kind == b"VP8L" else vp8_size)(self.file)
        has_alpha = picture.kind == b"VP8L" and self._read(picture, 5)[4] & 0x10
        flags = _WEBP_XMP | (_WEBP_ALPHA if has_alpha else 0)
        return b"".join(
            struct.pack("<I", side)[:size] for side, size in ((flags, 4), (width - 1, 3), (height - 1, 3))
        )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


_KINDS: Final[Mapping[str, type[_Picture]]] = {"image/png": _Png, "image/jpeg": _Jpeg, "image/webp": _Webp}


def _opened(file: BinaryIO) -> _Picture | None:
    kind = _KINDS.get(media_type_of(_at(file, 0, 12)) or "")
    return kind(file) if kind else None
