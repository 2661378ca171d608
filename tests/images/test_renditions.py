"""What renditions look like, and which ones there can be."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from pydantic import ValidationError

from prefect_ttapi import Rendition
from prefect_ttapi.errors import PictureError
from prefect_ttapi.images.renditions import render, versions_of
from tests.support.pictures import png_that_claims, saved, webp_that_claims

WEBP, JPEG, PNG = Rendition(max_size=60), Rendition(format="jpeg", max_size=60), Rendition(format="png")


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> Callable[[], BinaryIO]:
    return partial(io.BytesIO, saved(image, form, **options))


def made(opener: Callable[[], BinaryIO], rendition: Rendition) -> Image.Image:
    """The rendition, opened again."""
    (rendered,) = render(opener, [rendition])
    image = Image.open(rendered.spool.open())
    assert (rendered.width, rendered.height) == image.size
    assert image.get_format_mimetype() == rendition.media_type
    image.load()
    return image


def near(pixel: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(pixel) == len(expected) and all(abs(a - b) <= 12 for a, b in zip(pixel, expected, strict=True))


@pytest.mark.parametrize("rendition", [WEBP, JPEG, PNG], ids=lambda rendition: rendition.name)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_any_kind_of_image_gives_any_rendition(form: str, rendition: Rendition) -> None:
    """Of the asked-for kind and size, with its colours, from every kind of image that the API gives."""
    image = made(encoded(Image.new("RGB", (120, 80), (200, 40, 90)), form), rendition)
    assert image.size == ((120, 80) if rendition is PNG else (60, 40))
    assert near(image.convert("RGB").getpixel((30, 20)), (200, 40, 90))


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 16_383))
def test_nothing_is_enlarged(width: int, height: int, most: int) -> None:
    """The longest side is `max_size`, or the image's where that is shorter, and no side vanishes."""
    size = Rendition(max_size=most).size_of(width, height)
    assert max(size) == min(most, max(width, height))
    assert 1 <= min(size) <= min(width, height)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode(mode: str) -> None:
    """Whatever pixels an image stores, black stays black, and white or light grey is what they were."""
    light = 255 if mode == "1" else 204
    halves = Image.new("L", (80, 40), 0)
    halves.paste(light, (40, 0, 80, 40))
    if mode == "I;16":
        image = halves.convert("I").point(lambda level: level * 257).convert("I;16")
    else:
        image = halves.convert("RGB").convert(mode)
    opener = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    for rendition in (WEBP, JPEG, PNG):
        grey = made(opener, rendition).convert("L")
        assert near((grey.getpixel((5, 10)), grey.getpixel((grey.width - 5, 10))), (0, light))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent(mode: str) -> None:
    """It is white in a JPEG, and stays transparent in the others."""
    clear = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 10, 10))
    opener = (
        encoded(clear.convert(mode))
        if mode != "P"
        else encoded(clear.convert("RGB").convert("P"), transparency=bytes([255] + [0] * 255))
    )
    assert near(made(opener, JPEG).getpixel((40, 40)), (255, 255, 255))
    for rendition in (WEBP, PNG):
        assert made(opener, rendition).getpixel((40, 40))[3] == 0


def test_upright_in_srgb_and_without_stowaways() -> None:
    """A camera's orientation is applied, a profile's colours become sRGB, and neither of them stays in the file."""
    picture = Image.new("RGB", (100, 50), (10, 240, 10))
    picture.paste((240, 10, 10), (0, 0, 50, 50))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"  # turned a quarter to the right
    turned = made(encoded(picture, "JPEG", exif=exif), PNG)
    assert turned.size == (50, 100)
    assert near(turned.getpixel((25, 20)), (240, 10, 10))
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for profile in (b"p" * 50_000, lab_like):  # neither is of use for RGB
        plain = encoded(picture, "PNG", icc_profile=profile)
        assert near(made(plain, PNG).getpixel((20, 20)), (240, 10, 10))
    for rendition in (WEBP, JPEG, PNG):
        (rendered,) = render(encoded(picture, "JPEG", exif=exif, icc_profile=lab_like), [rendition])
        assert not Image.open(rendered.spool.open()).info.keys() & {"exif", "icc_profile"}
        assert b"live" not in rendered.spool.read_bytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_profile_says_what_the_numbers_mean(mode: str) -> None:
    """Where an image's profile calls green what sRGB calls red, its rendition is green; and as clear as it was."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"----", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"----", b"gXYZ", 1)
    red = Image.new(mode, (40, 40), (240, 10, 10, 128)[: len(mode)])
    for profile, expected in ((swapped, (10, 240, 10, 128)), (srgb, (240, 10, 10, 128))):
        pixel = made(encoded(red, icc_profile=profile), PNG).getpixel((20, 20))
        assert near(pixel, expected[: len(mode)])


def test_the_same_image_gives_the_same_bytes() -> None:
    """Also in many threads at once; so the same rendition delivered twice is one object."""
    opener = encoded(Image.effect_noise((300, 200), 90).convert("RGB"))
    renditions = [WEBP, JPEG, PNG]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: render(opener, renditions), range(8)))
    assert len({tuple(rendered.spool.sha256 for rendered in result) for result in results}) == 1


def test_no_more_images_are_decoded_at_once_than_there_are_processors() -> None:
    """However many threads ask: memory grows with processors, not with deliveries under way."""
    data = encoded(Image.new("RGB", (40, 40)))().read()
    lock, now, most = threading.Lock(), 0, 0

    class Watched(io.BytesIO):
        def __enter__(self) -> Watched:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            return self

        def __exit__(self, *_: object) -> None:
            nonlocal now
            with lock:
                now -= 1

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda _: render(lambda: Watched(data), [WEBP]), range(64)))
    assert 1 <= most <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + bytes(100),
        png_that_claims(16_000, 8_000),
        webp_that_claims(16_383, 16_383),
        encoded(Image.effect_noise((300, 300), 90))().read()[:5_000],
        encoded(Image.effect_noise((300, 300), 90), "JPEG")().read()[:5_000],
        encoded(Image.effect_noise((300, 300), 90), "WEBP")().read()[:5_000],
    ],
    ids=["empty", "gif", "png bomb", "webp bomb", "cut png", "cut jpeg", "cut webp"],
)
def test_what_is_no_image_or_a_bomb(data: bytes) -> None:
    """It is refused with one kind of error, a bomb before it is unfolded."""
    with pytest.raises(PictureError):
        render(partial(io.BytesIO, data), [WEBP])


def test_a_side_too_long_for_the_format() -> None:
    """WebP ends at 16,383 pixels a side: the error says what to do."""
    opener = encoded(Image.new("L", (16_400, 10)))
    with pytest.raises(PictureError, match="give max_size"):
        render(opener, [Rendition()])
    assert made(opener, Rendition(max_size=16_383)).width == 16_383


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"format": "gif"}, "webp"),
        ({"max_size": 0}, "greater than or equal to 1"),
        ({"max_size": 20_000}, "16383"),
        ({"format": "png", "quality": 80}, "keeps every pixel"),
        ({"quality": 101}, "100"),
        ({"name": "a/b"}, "pattern"),
        ({"name": "original"}, "the image itself"),
        ({"sharpen": True}, "no setting of Rendition"),
    ],
)
def test_impossible_renditions(fields: dict[str, object], why: str) -> None:
    """A rendition that can't be is refused where it is written down."""
    with pytest.raises(ValidationError, match=why):
        Rendition(**fields)


def test_versions_of_an_image() -> None:
    """The image first, then its renditions; names must differ, and something must be left to deliver."""
    assert versions_of([WEBP, JPEG]) == (None, WEBP, JPEG)
    assert versions_of([{"max_size": 60}], keep_original=False) == (WEBP,)
    with pytest.raises(ValueError, match="two renditions are called 'webp-60'"):
        versions_of([WEBP, Rendition(max_size=60)])
    with pytest.raises(ValueError, match="nothing would be delivered"):
        versions_of([], keep_original=False)
