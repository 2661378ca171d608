"""Read type, size in pixels and completeness of an image from its own bytes (sans-IO).

PNG, JPEG and WebP only. Pixels are not decoded: the headers are read as far as width and height, then the end
is looked at. Only padding may follow it (NUL, white space), as some encoders and proxies add.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from prefect_ttapi.images.spool import Spool

LONGEST_SIDE: Final = 65_535  # pixels: what JPEG can say, and more than WebP can
MOST_PADDING: Final = 4096  # bytes

#: Media type to file extension, without a dot.
EXTENSIONS: Final[Mapping[str, str]] = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}

_PADDING: Final = b"\0\t\n\r "
_MOST_PARTS: Final = 10_000  # looked at before the picture begins; real images have dozens

_PNG_END: Final = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_END: Final = b"\xff\xd9"
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN: Final = 0xDA
_JPEG_BARE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_JPEG_ILLEGAL: Final = frozenset({0x00, 0xD8, 0xD9})  # before the picture

Size = tuple[int, int]


class NotAnImage(ValueError):  # noqa: N818 - named for what it says
    """The bytes are no complete PNG, JPEG or WebP; the message says what is wrong with them."""


@dataclass(frozen=True)
class ImageFacts:
    """The media type (`image/png`, `image/jpeg` or `image/webp`), and width and height in pixels."""

    media_type: str
    width: int
    height: int


def read_image(spool: Spool) -> ImageFacts:
    """Return type and size of the complete image in `spool`.

    Raises:
        NotAnImage: empty, a web page, another type, cut short, or of a size that can't be.
    """
    head = spool.head(12)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        facts = ImageFacts("image/png", *_png_size(spool))
    elif head.startswith(b"\xff\xd8\xff"):
        facts = ImageFacts("image/jpeg", *_jpeg_size(spool))
    elif head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        facts = ImageFacts("image/webp", *_webp_size(spool))
    else:
        raise NotAnImage(f"the image is {_description(head)}")
    if not (1 <= facts.width <= LONGEST_SIDE and 1 <= facts.height <= LONGEST_SIDE):
        raise NotAnImage(f"the image claims to be {facts.width} x {facts.height} pixels")
    return facts


def _description(head: bytes) -> str:
    if not head:
        return "empty"
    for kind, starts in {"a web page or SVG": b"<", "JSON": b"{"}.items():
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(starts):
            return kind
    return f"no PNG, JPEG or WebP: it starts with {head.hex(' ')}"


def _png_size(spool: Spool) -> Size:
    header = spool.head(33)
    if len(header) < 33 or header[8:16] != b"\0\0\0\x0dIHDR":
        raise NotAnImage("the PNG has no header")
    width, height, checksum = struct.unpack(">16x2I5xI", header)
    if zlib.crc32(header[12:29]) != checksum:
        raise NotAnImage("the PNG's header is damaged")
    _check_end(spool, "PNG", _PNG_END)
    return width, height


def _jpeg_size(spool: Spool) -> Size:
    size = None
    with spool.open() as file:
        for marker in _jpeg_segments(file):
            if marker in _JPEG_FRAMES:
                _, height, width = struct.unpack(">BHH", _take(file, 5))
                size = width, height
            if marker == _JPEG_SCAN and size is not None:
                _check_end(spool, "JPEG", _JPEG_END)
                return size
    raise NotAnImage("the JPEG has no picture")


def _jpeg_segments(file: BinaryIO) -> Iterator[int]:
    """Yield each segment's marker, with `file` where its contents begin."""
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
            position += 2 + int.from_bytes(_take(file, 2))
            yield marker


def _webp_size(spool: Spool) -> Size:
    (riff,) = struct.unpack("<4xI", spool.head(8))
    end = 8 + riff
    if end > spool.size_bytes:
        raise NotAnImage(f"the WebP is cut short: {spool.size_bytes:,} of {end:,} bytes")
    extra = spool.size_bytes - end
    if extra > MOST_PADDING or spool.tail(extra).strip(_PADDING):
        raise NotAnImage("the WebP is followed by something else")
    canvas = None
    with spool.open() as file:
        for kind in _webp_chunks(file, end):
            if kind == b"VP8X":
                data = _take(file, 10)
                canvas = 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
            elif kind == b"ANMF" and canvas is not None:  # a frame of an animation
                return canvas
            elif kind == b"VP8 ":
                return _vp8_size(file)
            elif kind == b"VP8L":
                return _vp8l_size(file)
    raise NotAnImage("the WebP has no picture")


def _webp_chunks(file: BinaryIO, end: int) -> Iterator[bytes]:
    """Yield each chunk's kind, with `file` where its contents begin."""
    position = 12
    for _ in range(_MOST_PARTS):
        if position >= end:
            return
        file.seek(position)
        kind, length = struct.unpack("<4sI", _take(file, 8))
        position += 8 + length
        if position > end:
            raise NotAnImage("the WebP's contents are longer than the file")
        yield kind
        position += length % 2


def _vp8_size(file: BinaryIO) -> Size:
    frame, start, width, height = struct.unpack("<B2x3sHH", _take(file, 10))
    if frame & 1 or start != b"\x9d\x01\x2a":
        raise NotAnImage("the WebP's picture is damaged")
    return width & 0x3FFF, height & 0x3FFF  # the rest is a hint for scaling


def _vp8l_size(file: BinaryIO) -> Size:
    start, bits = struct.unpack("<BI", _take(file, 5))
    if start != 0x2F:
        raise NotAnImage("the WebP's picture is damaged")
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise NotAnImage("the image is cut short within its header")
    return data


def _check_end(spool: Spool, name: str, end: bytes) -> None:
    if not spool.tail(MOST_PADDING + len(end)).rstrip(_PADDING).endswith(end):
        raise NotAnImage(f"the {name} is cut short, or followed by something else")
