"""Read type, size in pixels and completeness of an image from its own bytes (sans-IO).

PNG, JPEG and WebP are what the API promises; GIF, BMP and AVIF are read, too. Pixels are not decoded: the headers are
read as far as width and height, then the end is looked for. What follows it is part of the file: labels of who made it,
padding, a second picture.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, Final, NamedTuple

from prefect_ttapi.images.spool import Spool

LONGEST_SIDE: Final = 65_535  # pixels: the limit of JPEG, which is beyond that of WebP

#: The types that the API promises.
PROMISED: Final = frozenset({"image/png", "image/jpeg", "image/webp"})

_PADDING: Final = b"\0\t\n\r "
_MOST_PADDING: Final = 4096  # bytes
_MOST_PARTS: Final = 10_000  # looked at before the picture begins; real images have dozens
_BLOCK: Final = 256 * 1024

#: A property of an AVIF that holds width and height, and the bytes of properties that are looked at, profiles included.
_AVIF_SIZE: Final = re.compile(rb"\0\0\0\x14ispe\0{4}(.{8})", re.DOTALL)
_MOST_PROPERTIES: Final = 4 * 1024 * 1024

_PNG_END: Final = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_END: Final = b"\xff\xd9"
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN: Final = b"\xda"
_JPEG_BARE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_JPEG_ILLEGAL: Final = frozenset({0x00, 0xD8, 0xD9})  # before the picture
#: Chunks of a WebP that are a still picture.
WEBP_PICTURES: Final = frozenset({b"VP8 ", b"VP8L"})
_JPEG_MARKER: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)  # within a picture

Size = tuple[int, int]


class Part(NamedTuple):
    """A chunk or a segment of a file: where it begins and ends, and where its contents do."""

    kind: bytes
    start: int
    body: int
    size: int
    end: int


class NotAnImage(ValueError):  # noqa: N818 - named for what it says
    """The bytes are no complete image of a kind that is known; the message says what is wrong with them."""


@dataclass(frozen=True)
class ImageFacts:
    """The media type (one of `EXTENSIONS`), and width and height in pixels."""

    media_type: str
    width: int
    height: int


def media_type_of(head: bytes) -> str | None:
    """Return the media type of what begins with these 12 bytes or more, None where it is no image.

    >>> media_type_of(b"GIF89a" + bytes(6)), media_type_of(b"<html></html>")
    ('image/gif', None)
    """
    return next((kind for kind, (_, magic, _) in _FORMATS.items() if re.match(magic, head, re.DOTALL)), None)


def read_image(spool: Spool) -> ImageFacts:
    """Return type and size of the complete image in `spool`.

    Raises:
        NotAnImage: empty, a web page, another type, cut short, or of a size that can't be.
    """
    head = spool.head(12)
    media_type = media_type_of(head)
    if media_type is None:
        raise NotAnImage(f"the image is {_description(head)}")
    _, _, size_of = _FORMATS[media_type]
    facts = ImageFacts(media_type, *size_of(spool))
    if not (1 <= facts.width <= LONGEST_SIDE and 1 <= facts.height <= LONGEST_SIDE):
        raise NotAnImage(f"the image claims to be {facts.width} x {facts.height} pixels")
    return facts


def _description(head: bytes) -> str:
    if not head:
        return "empty"
    for kind, starts in {"a web page or SVG": b"<", "JSON": b"{"}.items():
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(starts):
            return kind
    return f"of no kind that is known: it starts with {head.hex(' ')}"


def _png_size(spool: Spool) -> Size:
    header = spool.head(33)
    if len(header) < 33 or header[8:16] != b"\0\0\0\x0dIHDR":
        raise NotAnImage("the PNG has no header")
    width, height, checksum = struct.unpack(">16x2I5xI", header)
    if zlib.crc32(header[12:29]) != checksum:
        raise NotAnImage("the PNG's header is damaged")
    if not _ends_with(spool, _PNG_END) and not _has_png_end(spool):
        raise NotAnImage("the PNG is cut short")
    return width, height


def _has_png_end(spool: Spool) -> bool:
    with spool.open() as file:
        return any(part.kind == b"IEND" and part.end <= spool.size_bytes for part in png_parts(file))


def png_parts(file: BinaryIO) -> Iterator[Part]:
    """Yield the chunks of a PNG, whether or not all of the last one is there."""
    position = 8
    while len(head := bytes_at(file, position, 8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        yield Part(kind, position, position + 8, size, position + size + 12)
        position += size + 12


def _jpeg_size(spool: Spool) -> Size:
    size = None
    with spool.open() as file:
        for part in jpeg_parts(file):
            if part.kind[0] in _JPEG_FRAMES:
                file.seek(part.body)
                _, height, width = struct.unpack(">BHH", _take(file, 5))
                size = width, height
            if part.kind == _JPEG_SCAN and size is not None:
                if not _ends_with(spool, _JPEG_END) and not _has_jpeg_end(file, part.end):
                    raise NotAnImage("the JPEG is cut short")
                return size
    raise NotAnImage("the JPEG has no picture")


def jpeg_parts(file: BinaryIO) -> Iterator[Part]:
    """Yield the segments of a JPEG up to its first scan; their kind is their marker.

    Raises:
        NotAnImage: what follows is no segment.
    """
    position = 2
    for _ in range(_MOST_PARTS):
        file.seek(position)
        prefix, marker = _take(file, 2)
        if prefix != 0xFF or marker in _JPEG_ILLEGAL:
            raise NotAnImage("the JPEG's header is damaged")
        if marker == 0xFF:  # filling: the marker begins one byte later
            position += 1
        elif marker in _JPEG_BARE:
            position += 2
        else:
            size = int.from_bytes(_take(file, 2))
            part = Part(bytes([marker]), position, position + 4, max(0, size - 2), position + 2 + size)
            yield part
            if part.kind == _JPEG_SCAN:
                return
            position = part.end


def _has_jpeg_end(file: BinaryIO, position: int) -> bool:
    """Return whether a picture ends whose data begin at `position`."""
    while True:
        marker = None
        while marker is None and len(block := bytes_at(file, position, _BLOCK)) > 1:
            marker = _JPEG_MARKER.search(block)
            position += marker.end() if marker else len(block) - 1
        if marker is None or marker[0] == _JPEG_END:
            return marker is not None
        position += int.from_bytes(bytes_at(file, position, 2))


def _webp_size(spool: Spool) -> Size:
    canvas = None
    with spool.open() as file:
        end = webp_end(file)
        if end > spool.size_bytes:
            raise NotAnImage(f"the WebP is cut short: {spool.size_bytes:,} of {end:,} bytes")
        for part in islice(webp_parts(file), _MOST_PARTS):
            if part.body + part.size > end:
                raise NotAnImage("the WebP's contents are longer than the file")
            file.seek(part.body)
            if part.kind == b"VP8X":
                data = _take(file, 10)
                canvas = 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
            elif part.kind == b"ANMF" and canvas is not None:  # a frame of an animation
                return canvas
            elif part.kind in WEBP_PICTURES:
                return webp_picture_size(file, part)
    raise NotAnImage("the WebP has no picture")


def webp_end(file: BinaryIO) -> int:
    """Return where a WebP ends by its own account."""
    return 8 + int.from_bytes(bytes_at(file, 4, 4), "little")


def webp_parts(file: BinaryIO) -> Iterator[Part]:
    """Yield the chunks of a WebP, whether or not all of the last one is there."""
    position, end = 12, webp_end(file)
    while position + 8 <= end and len(head := bytes_at(file, position, 8)) == 8:
        kind, size = struct.unpack("<4sI", head)
        yield Part(kind, position, position + 8, size, position + 8 + size + size % 2)
        position += 8 + size + size % 2


def webp_picture_size(file: BinaryIO, picture: Part) -> Size:
    """Return width and height of a still picture in a WebP.

    Raises:
        NotAnImage: it is damaged.
    """
    file.seek(picture.body)
    if picture.kind == b"VP8L":  # lossless
        start, bits = struct.unpack("<BI", _take(file, 5))
        is_whole, width, height = start == 0x2F, 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        frame, start, width, height = struct.unpack("<B2x3sHH", _take(file, 10))
        is_whole = not frame & 1 and start == b"\x9d\x01\x2a"
        width, height = width & 0x3FFF, height & 0x3FFF  # the rest is a hint for scaling
    if not is_whole:
        raise NotAnImage("the WebP's picture is damaged")
    return width, height


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise NotAnImage("the image is cut short")
    return data


def bytes_at(file: BinaryIO, position: int, size: int) -> bytes:
    """Return `size` bytes from a position on, or fewer at the end."""
    file.seek(position)
    return file.read(size)


def _ends_with(spool: Spool, end: bytes) -> bool:
    start = max(0, spool.size_bytes - _MOST_PADDING - len(end))
    return spool.read_at(start, spool.size_bytes - start).rstrip(_PADDING).endswith(end)


def _gif_size(spool: Spool) -> Size:
    with spool.open() as file:
        width, height, flags = struct.unpack("<6xHHB2x", _take(file, 13))
        _skip_colours(file, flags)
        pictures = 0
        while (kind := _take(file, 1)) != b";":
            if kind == b"!":
                _take(file, 1)
            elif kind == b",":
                pictures += 1
                _skip_colours(file, _take(file, 9)[8])
                _take(file, 1)
            else:
                raise NotAnImage("the GIF is damaged")
            while (length := _take(file, 1)[0]) > 0:
                _take(file, length)
    if not pictures:
        raise NotAnImage("the GIF has no picture")
    return width, height


def _skip_colours(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        _take(file, 3 << 1 + (flags & 7))


def _bmp_size(spool: Spool) -> Size:
    with spool.open() as file:
        total, start, header = struct.unpack("<2xI4xII", _take(file, 18))
        if header == 12:
            width, height, bits = struct.unpack("<HH2xH", _take(file, 8))
            packing = 0
        elif header >= 40:
            width, height, bits, packing = struct.unpack("<ii2xHI", _take(file, 16))
        else:
            raise NotAnImage("the BMP's header is damaged")
    height = abs(height)  # below zero: the rows come from top to bottom
    # the length that it claims for itself is often none; packed rows have no other
    end = total if packing not in (0, 3, 6) else start + (width * bits + 31) // 32 * 4 * height
    if end > spool.size_bytes:
        raise NotAnImage(f"the BMP is cut short: {spool.size_bytes:,} of {end:,} bytes")
    return width, height


def _avif_size(spool: Spool) -> Size:
    sizes: list[Size] = []
    parts: set[bytes] = set()
    with spool.open() as file:
        for kind, start, end in _boxes(file, 0, spool.size_bytes):
            parts.add(kind)
            if kind == b"meta":
                for inner, begins, ends in _boxes(file, start + 4, end):
                    parts.add(inner)
                    if inner == b"iprp":
                        properties = bytes_at(file, begins, min(ends - begins, _MOST_PROPERTIES))
                        sizes += (struct.unpack(">II", found) for found in _AVIF_SIZE.findall(properties))
    if b"meta" not in parts or not parts & {b"mdat", b"idat"}:
        raise NotAnImage("the AVIF is cut short")
    if not sizes:
        raise NotAnImage("the AVIF has no picture")
    return max(sizes, key=lambda size: size[0] * size[1])  # the others are its tiles, and its thumbnails


def _boxes(file: BinaryIO, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each box that is whole, and the places where its contents begin and end."""
    for _ in range(_MOST_PARTS):
        if position + 8 > end:
            return
        length, kind = struct.unpack(">I4s", bytes_at(file, position, 8))
        begins = position + 8
        if length == 1:
            length, begins = int.from_bytes(bytes_at(file, begins, 8)), begins + 8
        length = length or end - position  # the last one may go on to the end
        if not begins <= position + length <= end:
            return
        yield kind, begins, position + length
        position += length


#: Each media type's file extension, the bytes that it begins with, and the function that reads width and height.
_FORMATS: Final = {
    "image/png": ("png", rb"\x89PNG\r\n\x1a\n", _png_size),
    "image/jpeg": ("jpg", rb"\xff\xd8\xff", _jpeg_size),
    "image/webp": ("webp", rb"RIFF....WEBP", _webp_size),
    "image/gif": ("gif", rb"GIF8[79]a", _gif_size),
    "image/bmp": ("bmp", rb"BM....\0\0\0\0", _bmp_size),
    "image/avif": ("avif", rb"\0\0..ftyp(?:avif|avis)", _avif_size),
}

#: Media type to file extension, without a dot.
EXTENSIONS: Final[Mapping[str, str]] = {kind: extension for kind, (extension, _, _) in _FORMATS.items()}
