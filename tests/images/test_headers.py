"""Type, size and completeness from an image's own bytes, with Pillow as the judge of what is right."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from prefect_ttapi.images.headers import EXTENSIONS, LONGEST_SIDE, ImageFacts, NotAnImage, read_image
from prefect_ttapi.images.spool import IN_MEMORY, Spool
from tests.support.pictures import noisy, png_of, saved

MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "AVIF": "image/avif",
}


def spooled(data: bytes) -> Spool:
    spool = Spool()
    spool.write(data)
    return spool


def exif_with_thumbnail(thumbnail: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x9286] = thumbnail  # the user's comment: any bytes
    return exif.tobytes()


THUMBNAIL = noisy("JPEG", "RGB", (16, 16))

#: Every variant of a format that generators, encoders and editors write.
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *[("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    ("PNG", "RGB", {"compress_level": 0}),
    ("PNG", "RGB", {"icc_profile": b"p" * 3000, "exif": exif_with_thumbnail(THUMBNAIL), "dpi": (72, 72)}),
    *[("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")],
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"quality": 1}),
    ("JPEG", "RGB", {"quality": 100, "subsampling": 0}),
    ("JPEG", "RGB", {"restart_marker_rows": 1}),
    ("JPEG", "RGB", {"comment": b"\xff\xd9 an end that is none", "exif": exif_with_thumbnail(THUMBNAIL)}),
    ("JPEG", "RGB", {"icc_profile": b"p" * 200_000}),
    *[("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)],
    ("WEBP", "RGB", {"exif": exif_with_thumbnail(THUMBNAIL), "icc_profile": b"p" * 3001}),
    ("WEBP", "RGBA", {"save_all": True}),
    *[("GIF", mode, {}) for mode in ("L", "P", "RGB", "RGBA")],
    ("GIF", "P", {"save_all": True, "loop": 0, "comment": b"; an end that is none"}),
    *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
    *[("AVIF", mode, {"speed": 10}) for mode in ("RGB", "RGBA")],
    ("AVIF", "RGB", {"speed": 10, "save_all": True, "exif": exif_with_thumbnail(THUMBNAIL)}),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}-{'-'.join(v[2])}")
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (40, 30), (517, 64)])
def test_agrees_with_pillow(variant: tuple[str, str, dict[str, Any]], size: tuple[int, int]) -> None:
    """Type and size are what Pillow says, for every format, mode and option, in memory and from a file."""
    form, mode, options = variant
    data = noisy(form, mode, size, **options)
    with Image.open(io.BytesIO(data)) as judged:
        expected = ImageFacts(MEDIA_TYPES[str(judged.format)], *judged.size)
    assert (expected.width, expected.height) == size
    assert read_image(spooled(data)) == expected


@example(form="WEBP", width=16383, height=1, turned=False, lossless=True)
@example(form="WEBP", width=16383, height=1, turned=True, lossless=True)
@example(form="WEBP", width=16383, height=1, turned=False, lossless=False)
@example(form="WEBP", width=16383, height=1, turned=True, lossless=False)
@given(
    form=st.sampled_from(sorted(MEDIA_TYPES.keys() - {"AVIF"})),  # which takes long to write
    width=st.integers(1, 3000),
    height=st.integers(1, 40),
    turned=st.booleans(),
    lossless=st.booleans(),
)
def test_agrees_with_pillow_on_any_size(
    form: str, width: int, height: int, turned: bool, lossless: bool
) -> None:
    """Width and height are never mixed up, nor their bits, up to the largest side that WebP has."""
    size = (height, width) if turned else (width, height)
    data = saved(Image.new("L", size), form, lossless=lossless)
    assert read_image(spooled(data)) == ImageFacts(MEDIA_TYPES[form], *size)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}-{'-'.join(v[2])}")
def test_every_truncation_is_refused(variant: tuple[str, str, dict[str, Any]]) -> None:
    """An image that is cut short anywhere is no image."""
    form, mode, options = variant
    data = noisy(form, mode, (24, 17), **options)
    step = max(1, len(data) // 3000)
    for end in [*range(0, len(data), step), *range(max(0, len(data) - 50), len(data))]:
        with pytest.raises(NotAnImage):
            read_image(spooled(data[:end]))


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_truncation_of_a_large_image(form: str) -> None:
    """What is too large for memory is judged in the same way from its file."""
    data = noisy(
        form, "RGB", (400, 300), **{"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(form, {})
    )
    assert len(data) > IN_MEMORY
    assert read_image(spooled(data)) == ImageFacts(MEDIA_TYPES[form], 400, 300)
    for end in (len(data) - 1, len(data) // 2, IN_MEMORY + 1):
        with pytest.raises(NotAnImage, match="cut short"):
            read_image(spooled(data[:end]))


FOLLOWING = {
    "padding": b"\0\r\n \t" * 2000,
    "a label": b'AIGC{"Label":"1","ContentProducer":"x"}',
    "a phone's trailer": b"SEFHe\0\0\0" + bytes(range(256)) * 30,
    "another picture": noisy("JPEG", "RGB", (9, 9)),
    "something marked": b"\xff\xd8\xff\xe1" + b"\xff" * 99,
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}-{'-'.join(v[2])}")
@pytest.mark.parametrize("what", FOLLOWING)
def test_what_follows_an_image_is_part_of_its_file(
    variant: tuple[str, str, dict[str, Any]], what: str
) -> None:
    """Labels, trailers and second pictures behind the end cost no image."""
    form, mode, options = variant
    data = noisy(form, mode, (40, 30), **options)
    assert read_image(spooled(data + FOLLOWING[what])) == ImageFacts(MEDIA_TYPES[form], 40, 30)


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_a_large_image_with_something_behind_it(form: str) -> None:
    """The end of what is too large for memory is found as well, where pieces meet, too."""
    data = noisy(
        form,
        "RGB",
        (500, 400),
        **{"JPEG": {"quality": 100}, "AVIF": {"speed": 10, "quality": 100}}.get(form, {}),
    )
    assert len(data) > IN_MEMORY
    for more in (b"x", bytes(300_000), b"\xff" * 300_000):
        assert read_image(spooled(data + more)) == ImageFacts(MEDIA_TYPES[form], 500, 400)


GOOD_JPEG = noisy("JPEG", "RGB", (40, 30))
FRAME = GOOD_JPEG.index(b"\xff\xc0")
SCAN = GOOD_JPEG.index(b"\xff\xda")
GOOD_VP8 = noisy("WEBP", "RGB", (9, 9))
KEY_FRAME = GOOD_VP8.index(b"\x9d\x01\x2a") - 3
ANIMATED = noisy("WEBP", "RGBA", (9, 9), save_all=True)
CANVAS = ANIMATED.index(b"VP8X") + 12
VP8X = noisy("WEBP", "RGB", (40, 30), exif=exif_with_thumbnail(b""))

GOOD_BMP = noisy("BMP", "RGB", (40, 30))
GOOD_AVIF = noisy("AVIF", "RGB", (40, 30), speed=10)

REFUSED = {
    "empty": (b"", "empty"),
    "a web page": (b"\n<!DOCTYPE html><title>502</title>", "web page"),
    "a web page with a byte-order mark": (b"\xef\xbb\xbf<html>", "web page"),
    "JSON": (b'{"error": "no such file"}', "JSON"),
    "a TIFF": (b"II*\x00\x10\x00\x00\x00 and so on", "starts with 49 49 2a"),
    "a HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "starts with 00 00 00 18 66 74 79 70 68"),
    "a GIF without a picture": (b"GIF89a\1\0\1\0\0\0\0!\xfe\1x\0;", "no picture"),
    "a GIF of unknown blocks": (b"GIF89a\1\0\1\0\0\0\0?", "damaged"),
    "a BMP with a strange header": (b"BM" + bytes(12) + b"\1" + bytes(50), "header is damaged"),
    "a BMP of negative width": (GOOD_BMP[:18] + b"\xff\xff\xff\xff" + GOOD_BMP[22:], "-1 x 30 pixels"),
    "an AVIF without sizes": (GOOD_AVIF.replace(b"ispe", b"isqe"), "no picture"),
    "an AVIF without pixels": (GOOD_AVIF[: GOOD_AVIF.index(b"mdat") - 4], "cut short"),
    "only a signature": (b"\x89PNG\r\n\x1a\n", "no header"),
    "a PNG without width": (png_of(0, 10), "0 x 10 pixels"),
    "a PNG without height": (png_of(10, 0), "10 x 0 pixels"),
    "an absurd PNG": (png_of(LONGEST_SIDE + 1, 1), "65536 x 1 pixels"),
    "a PNG with a damaged header": (
        png_of(300, 300).replace(b"\x01\x2c", b"\x01\x2d", 1),
        "header is damaged",
    ),
    "a PNG that begins otherwise": (png_of(3, 3).replace(b"IHDR", b"iHDR"), "no header"),
    "a JPEG without height": (GOOD_JPEG[: FRAME + 5] + b"\0\0" + GOOD_JPEG[FRAME + 7 :], "40 x 0 pixels"),
    "a JPEG without frame": (
        GOOD_JPEG[:FRAME] + GOOD_JPEG[SCAN:],
        "no picture|damaged",
    ),
    "a JPEG cut behind a comment that looks like the end": (
        GOOD_JPEG[:SCAN] + b"\xff\xfe\x00\x04\xff\xd9",
        "cut short",
    ),
    "a JPEG that ends at once": (b"\xff\xd8\xff\xd9", "damaged"),
    "a JPEG of nothing but segments": (b"\xff\xd8" + b"\xff\xfe\0\2" * 20_000, "no picture"),
    "a JPEG of filling": (b"\xff\xd8" + b"\xff" * 100_000, "no picture"),
    "a WebP that lies about its length": (VP8X[:4] + b"\xff\xff\xff\xff" + VP8X[8:], "cut short"),
    "a WebP whose chunk is too long": (VP8X[:16] + b"\0\0\0\1" + VP8X[20:], "longer than the file"),
    "a WebP without a picture": (VP8X.replace(b"VP8 ", b"VP9 "), "no picture"),
    "a WebP of nothing but chunks": (
        b"RIFF" + struct.pack("<I", 160_004) + b"WEBP" + b"ABCD\0\0\0\0" * 20_000,
        "no pict",
    ),
    "a WebP with damaged VP8": (GOOD_VP8.replace(b"\x9d\x01\x2a", b"\x9d\x01\x2b"), "damaged"),
    "a WebP of a VP8 that is no key frame": (
        GOOD_VP8[:KEY_FRAME] + bytes([GOOD_VP8[KEY_FRAME] | 1]) + GOOD_VP8[KEY_FRAME + 1 :],
        "damaged",
    ),
    "an absurd animation": (ANIMATED[:CANVAS] + b"\0\0\1" + ANIMATED[CANVAS + 3 :], "65537 x 9 pixels"),
    "a WebP with damaged VP8L": (
        noisy("WEBP", "RGB", (9, 9), lossless=True).replace(b"\x2f", b"\x2e", 1),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_and_described(name: str) -> None:
    """The error says what is wrong with the bytes."""
    data, message = REFUSED[name]
    with pytest.raises(NotAnImage, match=message):
        read_image(spooled(data))


def test_rows_of_a_bmp_may_come_from_top_to_bottom() -> None:
    """A height below zero says in which order the rows come, and a length of 0 says nothing."""
    data = GOOD_BMP[:2] + bytes(4) + GOOD_BMP[6:22] + struct.pack("<i", -30) + GOOD_BMP[26:]
    assert read_image(spooled(data)) == ImageFacts("image/bmp", 40, 30)


def test_filling_before_a_marker_is_legal() -> None:
    """JPEG allows any number of FF bytes before a marker."""
    data = GOOD_JPEG[:FRAME] + b"\xff\xff\xff" + GOOD_JPEG[FRAME:]
    assert read_image(spooled(data)) == ImageFacts("image/jpeg", 40, 30)


def test_scaling_is_no_size() -> None:
    """The two bits above a VP8 picture's width and height are a hint for scaling, no part of them."""
    data = bytearray(GOOD_VP8)
    data[KEY_FRAME + 7] |= 0x40
    data[KEY_FRAME + 9] |= 0xC0
    assert read_image(spooled(bytes(data))) == ImageFacts("image/webp", 9, 9)


STARTS = st.sampled_from(
    [
        b"",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xc0\0\x11\x08",
        b"RIFF",
        b"GIF89a\5\0\4\0\0\0\0",
        b"BM" + bytes(12) + b"\x28\0\0\0",
        b"\0\0\0\x10ftypavif\0\0\0\0\0\0\0\x50meta\0\0\0\0",
    ]
)
SMALL = [
    noisy(form, mode, (5, 4), **options) for form, mode, options in VARIANTS if "icc_profile" not in options
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SMALL)))
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, min(len(data), 64)) | st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@settings(max_examples=400)
@given(st.tuples(STARTS, st.binary(max_size=80)).map(b"".join) | mutated())
def test_hostile_bytes_raise_nothing_else(data: bytes) -> None:
    """Random and damaged bytes are an image with a sane size, or not an image; nothing else ever happens."""
    try:
        facts = read_image(spooled(data))
    except NotAnImage:
        return
    assert facts.media_type in EXTENSIONS
    assert 1 <= facts.width <= LONGEST_SIDE
    assert 1 <= facts.height <= LONGEST_SIDE
