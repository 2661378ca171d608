"""Placeholder pictures: what was asked for, recognisable, distinct, and the same each time."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prefect_ttapi.images.signing import read_signature
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox.pictures import SHOWN, Picture, Studio, draw, padded, signer_for_testing

PICTURE = Picture(ImageRequest(prompt="a lighthouse at dawn", model="gpt-image-2"), 256, 256, key="k")


def changed(**fields: object) -> Picture:
    """PICTURE with other fields, its own or its request's; nothing is checked."""
    asked = {name: fields.pop(name) for name in list(fields) if name in ImageRequest.model_fields}
    request = ImageRequest.model_construct(**dict(PICTURE.request) | asked)
    return replace(PICTURE, request=request, **fields)


def opened(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(draw(picture)))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("size", [(256, 256), (48, 16), (16, 48), (384, 128), (640, 960)])
def test_format_and_size_are_as_asked(output_format: str, size: tuple[int, int]) -> None:
    """Every format and shape, also where no letter fits, is a whole image of that format and size."""
    image = opened(changed(output_format=output_format, width=size[0], height=size[1]))
    image.load()
    assert (image.format, image.size) == (output_format.upper(), size)


def test_equal_pictures_are_equal_bytes() -> None:
    """Drawing the same picture again gives the same bytes."""
    assert draw(PICTURE) == draw(replace(PICTURE))


@pytest.mark.parametrize(
    "change", [{"index": 1}, {"key": "other"}, {"prompt": "a cat"}, {"model": "dall-e-2"}, {"n": 2}]
)
def test_another_picture_is_other_bytes(change: dict[str, object]) -> None:
    """Index, key, prompt, model and n are each seen in the picture."""
    assert draw(changed(**change)) != draw(PICTURE)


def test_another_index_has_other_colours() -> None:
    """Images of one answer differ by colour, not only by a number in small letters."""
    skies = {opened(changed(index=index)).getpixel((2, 2)) for index in range(10)}
    assert len(skies) == 10


@pytest.mark.parametrize("size", [(1024, 1024), (1536, 1024), (1024, 1536), (64, 64)])
@pytest.mark.parametrize("background", ["auto", "transparent"])
def test_the_word_sandbox_is_large(size: tuple[int, int], background: str) -> None:
    """In a thumbnail, white letters with dark edges span more than half of the upper part's width."""
    image = opened(changed(width=size[0], height=size[1], background=background)).convert("RGBA")
    image.thumbnail((128, 128))
    letters = image.crop((0, 0, image.width, round(image.height * 0.35)))
    bright = [
        x for x in range(letters.width) if any(_is(letters, x, y, 200, 255) for y in range(letters.height))
    ]
    dark = [x for x in range(letters.width) if any(_is(letters, x, y, 0, 90) for y in range(letters.height))]
    assert len(bright) > image.width * 0.5
    assert len(dark) > image.width * 0.3  # edges, not whole letters


def _is(image: Image.Image, x: int, y: int, low: int, high: int) -> bool:
    red, green, blue, alpha = image.getpixel((x, y))
    return alpha > 128 and low <= min(red, green, blue) and max(red, green, blue) <= high


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_a_transparent_background_is_transparent(output_format: str) -> None:
    """The sky is left out where transparency is asked for, and only there."""
    clear = opened(changed(output_format=output_format, background="transparent"))
    assert clear.convert("RGBA").getpixel((1, 1))[3] == 0
    assert opened(changed(output_format=output_format)).mode == "RGB"


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_is_honoured(output_format: str) -> None:
    """Less quality is fewer bytes, and 0 is a picture, too."""
    sizes = [
        len(draw(changed(output_format=output_format, output_compression=each))) for each in (0, 50, 100)
    ]
    assert sizes == sorted(set(sizes))


def test_an_unfinished_picture_is_coarse() -> None:
    """Below the word, an unfinished picture is made of blocks of one colour, and has no caption."""
    image = opened(changed(blocks=32))
    for left in range(0, 256, 32):
        block = image.crop((left, 128, left + 32, 160))
        assert len(block.getcolors() or []) == 1


def test_padding_gives_the_length_and_leaves_the_picture() -> None:
    """A padded PNG has exactly the length asked for and the same pixels; one that is long already is left."""
    png = draw(PICTURE)
    noise = bytes(range(256)) * 400
    longer = padded(png, noise)
    assert len(longer) == len(noise)
    assert Image.open(io.BytesIO(longer)).tobytes() == Image.open(io.BytesIO(png)).tobytes()
    assert padded(png, noise[:100]) == png


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120))
def test_any_text_is_drawn(prompt: str) -> None:
    """No text a prompt can hold keeps a picture from being drawn."""
    assert opened(changed(prompt=prompt, width=160, height=160)).size == (160, 160)


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("Straße", "Strasse"),
        ("Bär", "Bar"),
        ("Οδός", "Οδος"),
        ("ёлка", "елка"),
        ("灯塔", "灯台"),
        ("🦊", "🦉"),
    ],
)
def test_any_letter_is_seen(prompt: str, other: str) -> None:
    """Prompts that differ in one letter of any script are different pictures."""
    assert draw(changed(prompt=prompt)) != draw(changed(prompt=other))


def test_a_long_prompt_is_cut() -> None:
    """Of a prompt of 32,000 characters only the beginning is drawn."""
    long, shown = "word " * 6400, "word " * (SHOWN // 5)
    assert draw(changed(prompt=long)) == draw(changed(prompt=shown + "another"))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_pictures_can_have_credentials(output_format: str) -> None:
    """Finished ones do, of a certificate for testing and with the model as what made them; their pixels stay."""
    studio = Studio(image_bytes=40_000, signer=signer_for_testing())
    picture = changed(output_format=output_format)
    made = studio.made(picture)
    found = read_signature(io.BytesIO(made), f"image/{output_format}")
    assert found is not None
    assert (found.problem, found.signed_by) == (None, "prefect-ttapi sandbox, for testing only")
    assert (found.request_hash, found.source_sha256) == (None, None)
    assert b"gpt-image-2" in made
    assert Image.open(io.BytesIO(made)).tobytes() == opened(picture).tobytes()
    assert read_signature(io.BytesIO(studio.made(replace(picture, blocks=64))), "image/png") is None
