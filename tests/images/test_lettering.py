"""Text on pictures: every script is legible or stands there in numbers, and nothing is left out."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, features

from prefect_ttapi.images.lettering import EUROPEAN, Lettering, installed

OURS = (EUROPEAN,)
ARABIC = "منارة"


def ink(text: str, size: float = 40, fonts: tuple[str, ...] | None = OURS) -> bytes:
    """What is drawn of one line."""
    image = Image.new("L", (600, 80))
    lettering = Lettering(text, size, fonts)
    lettering.write(ImageDraw.Draw(image), 10, 55, lettering.text, "white")
    return image.tobytes()


@pytest.mark.parametrize(
    ("text", "plainer"),
    [
        ("ß", "s"), ("ä", "a"), ("Öl", "Ol"), ("ø", "o"), ("ł", "l"), ("ő", "ö"), ("ğ", "g"), ("İ", "I"), ("ñ", "n"),
        ("ệ", "ê"), ("ώ", "ω"), ("ё", "е"), ("Ґ", "Г"), ("„a“", '"a"'), ("5 €", "5 E"),
        ("x²", "x2"),
    ],
)  # fmt: skip
def test_letters_of_europe_need_no_font_of_the_system(text: str, plainer: str) -> None:
    """They are drawn as letters, and are not what they would be without their marks."""
    assert len({ink(text), ink(plainer), ink("\U000f0000" * len(text))}) == 3
    assert Lettering(text, 40, OURS).width(text) < len(text) * 36  # boxes are wider


@pytest.mark.parametrize("text", ["e\u0301", "a\u0308", "о\u0306"])
def test_marks_are_composed(text: str) -> None:
    """A letter and the mark on it look as the letter that has the mark."""
    assert ink(text) == ink(unicodedata.normalize("NFC", text))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.characters(categories=["Lo", "So", "Co", "Cn", "Cs"], min_codepoint=0x2E80), min_size=2, max_size=2
    )
)
def test_what_no_font_has_is_a_box_with_its_number(pair: list[str]) -> None:
    """Characters of other scripts, private ones and broken ones are all drawn, and none as another."""
    first, second = (unicodedata.normalize("NFC", char) for char in pair)
    assert any(ink(first))
    assert (ink(first) == ink(second)) == (first == second)


def test_a_box_stands_among_letters() -> None:
    """What follows a box moves on by its width, in whatever font it is."""
    lettering = Lettering("ä灯ä", 40, OURS)
    assert lettering.width("ä灯ä") == pytest.approx(2 * lettering.width("ä") + lettering.width("灯"))
    assert lettering.width("灯") == 34
    after, letter = (Image.frombytes("L", (600, 80), ink(text)) for text in ("灯ä", "ä"))
    assert after.crop((44, 0, 144, 80)).tobytes() == letter.crop((10, 0, 110, 80)).tobytes()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=320) | st.text(max_size=40), st.integers(60, 400))
def test_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    """Wrapped lines are no wider than they may be, and hold all letters in order."""
    lettering = Lettering(text, 20, OURS)
    lines = lettering.wrapped(width)
    assert max(map(lettering.width, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(lettering.text.split())
    if text.isascii():
        assert "".join(lettering.text.split()) == "".join(
            char for char in text if char.isprintable() and char != " "
        )


def test_fonts_of_the_system_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known font anywhere below the folder for fonts is used, an unknown one is not."""
    folder = tmp_path / "fonts" / "truetype" / "some"
    folder.mkdir(parents=True)
    for name in ("unifont.otf", "Unknown.ttf", "DejaVuSans.ttf"):
        shutil.copy(EUROPEAN, folder / name)
    monkeypatch.setenv("XDG_DATA_DIRS", f"/nowhere:{tmp_path}")
    monkeypatch.setenv("HOME", str(tmp_path))
    installed.cache_clear()
    try:
        assert installed()[:3] == (*OURS, str(folder / "DejaVuSans.ttf"), str(folder / "unifont.otf"))
    finally:
        installed.cache_clear()


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow has no libraqm")
def test_right_to_left() -> None:
    """Arabic letters join, and the second letter of a Hebrew word stands left of the first."""
    if ink(ARABIC) == ink(ARABIC, fonts=None):
        pytest.skip("no font of this system has Arabic and Hebrew letters")
    arabic = Lettering(ARABIC, 40)
    assert arabic.width(ARABIC) < sum(map(arabic.width, ARABIC)) * 0.95
    second = (10, 0, 10 + int(Lettering("ב", 40).width("ב")) - 1, 80)
    word, letter = (Image.frombytes("L", (600, 80), ink(text, fonts=None)) for text in ("אב", "ב"))
    assert word.crop(second).tobytes() == letter.crop(second).tobytes()
