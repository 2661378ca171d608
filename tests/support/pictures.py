"""Files of pictures put together by hand: headers that claim any size, whatever follows."""

from __future__ import annotations

import struct
import zlib


def png_of(width: int, height: int, data: bytes = b"", **ballast: bytes) -> bytes:
    """A PNG of these sides, with `data` in its one IDAT chunk and chunks of ballast before that."""
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    more = [(kind.encode(), filling) for kind, filling in ballast.items()]
    chunks = [(b"IHDR", header), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose few pixels are zeros, whatever its sides."""
    return png_of(width, height, zlib.compress(bytes(100_000)))


def webp_that_claims(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + sides + b"ANIM" + struct.pack("<I", 6)
    return b"RIFF" + struct.pack("<I", len(body) + 6) + body + bytes(6)
