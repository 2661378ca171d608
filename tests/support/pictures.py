"""Files of pictures: drawn ones, and some put together by hand, whose headers claim any size, whatever follows."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The picture as a file; into a PNG, `xmp` is written here, `zip`ped or not, as Pillow does it for others only."""
    if form == "PNG" and "xmp" in options:
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", options.pop("xmp").decode(), zip=options.pop("zip", False))
        options["pnginfo"] = info
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noisy(form: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    """A file of noise, the same each time; with `save_all` it has two frames."""
    noise = random.Random(f"{form}{mode}{size}").randbytes(size[0] * size[1] * 4)  # noqa: S311 - no secret
    image = Image.frombytes("RGBA", size, noise).convert(mode)
    frames = {"append_images": [image.rotate(180)]} if "save_all" in options else {}
    return saved(image, form, **options, **frames)


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


def manifest_store(size: int) -> bytes:
    """A JUMBF box of this length that calls itself a C2PA manifest store."""
    described = b"c2pa\0\x11\0\x10\x80\0\0\xaa\0\x38\x9b\x71\x03c2pa\0"
    box = struct.pack(">I4s", len(described) + 8, b"jumd") + described
    return struct.pack(">I4s", size, b"jumb") + box + bytes(size - 8 - len(box))


def with_credentials(data: bytes, store: bytes) -> bytes:
    """A PNG, JPEG or WebP with this manifest store in its place."""
    if data.startswith(b"\x89PNG"):
        chunk = b"caBX" + store
        framed = struct.pack(">I", len(store)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return data[:33] + framed + data[33:]
    if data.startswith(b"RIFF"):
        chunk = b"C2PA" + struct.pack("<I", len(store)) + store + bytes(len(store) % 2)
        return data[:4] + struct.pack("<I", len(data) - 8 + len(chunk)) + data[8:] + chunk
    most, head = 65_000, store[:8]
    pieces = [store[:most]] + [head + store[at : at + most] for at in range(most, len(store), most)]
    segments = [
        struct.pack(">HHHHI", 0xFFEB, len(piece) + 10, 0x4A50, 1, number) + piece
        for number, piece in enumerate(pieces, start=1)
    ]
    return data[:2] + b"".join(segments) + data[2:]
