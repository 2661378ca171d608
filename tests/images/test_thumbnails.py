"""Thumbnails: small, and made of hostile bytes without harm."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prefect_ttapi.errors import PictureError
from prefect_ttapi.images.renditions import ARTIFACT_BOX, MAX_PIXELS, as_data_uri, thumbnail
from tests.support.pictures import png_that_claims, saved, webp_that_claims
from tests.support.rows import picture

SAMPLES = [picture(form="PNG"), picture(form="JPEG"), picture(form="WEBP"), picture(mode="RGBA")]


def opened(webp: bytes) -> Image.Image:
    return Image.open(io.BytesIO(webp), formats=["WEBP"])


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize(("width", "height", "expected"), [(1536, 1024, (180, 120)), (20, 30, (20, 30))])
def test_fits_the_box(form: str, width: int, height: int, expected: tuple[int, int]) -> None:
    """A large image is scaled into the box with its proportions, a small one keeps its size."""
    small = opened(thumbnail(io.BytesIO(picture(width, height, form=form))))
    assert small.size == expected
    assert small.convert("L").getpixel((0, 0)) < 40
    assert small.convert("L").getpixel((small.width - 1, 0)) > 215


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_every_mode(mode: str) -> None:
    """Whatever a PNG stores, its thumbnail goes from dark to light as the image does."""
    small = opened(thumbnail(io.BytesIO(picture(300, 200, mode=mode)))).convert("L")
    assert small.getpixel((2, 40)) + 100 < small.getpixel((125, 40))


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (255, 0, 0, 0)), ("LA", (255, 0))])
def test_transparent_stays_transparent(mode: str, clear: tuple[int, ...]) -> None:
    """A page behind a transparent image shows through its thumbnail."""
    data = saved(Image.new(mode, (300, 300), clear))
    assert opened(thumbnail(io.BytesIO(data))).getpixel((5, 5))[3] == 0


@pytest.mark.parametrize("box", [128, 256])
def test_small_in_bytes(box: int) -> None:
    """Pure noise, the worst there is, stays near the bound; a plain picture is below 2 KB."""
    noise = saved(Image.effect_noise((512, 512), 120).convert("RGB"))
    assert len(thumbnail(io.BytesIO(noise), box)) < box * box / 2
    assert len(thumbnail(io.BytesIO(picture(512, 512)), box)) < 2_000


def test_profiles_and_comments_stay_behind() -> None:
    """A thumbnail carries no colour profile and no Exif, whatever the image had."""
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    data = saved(Image.new("RGB", (300, 300)), "JPEG", exif=exif, icc_profile=b"p" * 50_000)
    small = thumbnail(io.BytesIO(data))
    assert len(small) < 1_000
    assert b"live" not in small


@pytest.mark.parametrize(
    "bomb",
    [
        png_that_claims(2**31 - 1, 2**31 - 1),
        png_that_claims(10_000, 10_000),
        png_that_claims(16_000, 8_000),
        webp_that_claims(16_383, 16_383),
        webp_that_claims(10_000, 10_000),
    ],
    ids=["png huge", "png over", "png where Pillow only warns", "webp huge", "webp over"],
)
def test_bombs(bomb: bytes) -> None:
    """An image that unfolds to more than the limit is refused from its header, without a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(PictureError):
            thumbnail(io.BytesIO(bomb))
    assert not caught


def test_the_limit_is_on_pixels() -> None:
    """Just below the limit the size is no reason to refuse, and what then is missing is."""
    with pytest.raises(PictureError, match="can't be read"):
        thumbnail(io.BytesIO(png_that_claims(MAX_PIXELS // 10_000, 10_000)))
    with pytest.raises(PictureError, match="8001 x 10000 pixels; 80,000,000 are the limit"):
        thumbnail(io.BytesIO(png_that_claims(MAX_PIXELS // 10_000 + 1, 10_000)))


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"<html>", b"\x89PNG", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff"]
)
def test_no_image(data: bytes) -> None:
    """What is no image says so."""
    with pytest.raises(PictureError):
        thumbnail(io.BytesIO(data))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=150)
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged(image: bytes, data: st.DataObject) -> None:
    """A damaged image gives a thumbnail or a PictureError, nothing else."""
    damaged = bytearray(image)
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for hostile in (damaged, damaged[:cut]):
        try:
            made = thumbnail(io.BytesIO(hostile))
        except PictureError:
            continue
        assert opened(made).width <= ARTIFACT_BOX


def test_reads_from_where_the_file_stands() -> None:
    """An image behind other bytes is found at the file's position, and the file stays open."""
    file = io.BytesIO(b"before" + picture())
    file.seek(6)
    assert thumbnail(file) == thumbnail(io.BytesIO(picture()))
    assert not file.closed


def test_many_threads() -> None:
    """Eight threads make the same thumbnails as one."""
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda n: thumbnail(io.BytesIO(SAMPLES[n % 4])), range(64)))
    assert many == [thumbnail(io.BytesIO(sample)) for sample in SAMPLES] * 16


def test_data_uri() -> None:
    """A data: address names the type and holds every byte."""
    assert as_data_uri(b"\0\xff") == "data:image/webp;base64,AP8="
