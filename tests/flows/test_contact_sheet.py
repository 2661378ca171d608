"""The contact sheet: a cell for each row and column, whatever is in it."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from flows.contact_sheet import CELL, GAP, HEADER, LABEL, contact_sheet
from prefect_ttapi.images.renditions import thumbnail


def picture(colour: str, size: tuple[int, int] = (CELL, CELL)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    file.seek(0)
    return thumbnail(file, CELL)


def pixel(sheet: Image.Image, row: int, column: int) -> tuple[int, ...]:
    """The colour in the middle of a cell."""
    middle = CELL // 2
    return sheet.getpixel(
        (LABEL + GAP + column * (CELL + GAP) + middle, HEADER + row * (CELL + GAP) + middle)
    )


def test_every_picture_is_in_its_cell() -> None:
    """Rows and columns keep their order; a small picture is centred; a text stands where there is none."""
    cells = [[picture("red"), picture("blue", (40, 20))], ["refused: " + "very long " * 50, picture("lime")]]
    sheet = Image.open(io.BytesIO(contact_sheet(["one", "two"], ["left", "right"], cells)))
    near = {"red": (255, 0, 0), "blue": (0, 0, 255), "lime": (0, 255, 0)}
    for (row, column), colour in {(0, 0): "red", (0, 1): "blue", (1, 1): "lime"}.items():
        assert pixel(sheet, row, column) == pytest.approx(near[colour], abs=8)
    assert sheet.size == (LABEL + GAP + 2 * (CELL + GAP), HEADER + GAP + 2 * (CELL + GAP))


@pytest.mark.parametrize("label", ["", "x" * 5000, "línea\n\tдва \u202e三 \x07", "{a}%s"])
def test_any_text_can_be_a_label(label: str) -> None:
    """Empty, endless, in any script, with control characters: a sheet comes out."""
    assert contact_sheet([label], [label], [[label]]).startswith(b"\x89PNG")


def test_labels_of_any_script_are_legible() -> None:
    """A label in other letters is another sheet: none is left out or drawn as another."""
    labels = ["Straße", "Strasse", "灯塔", "灯台", "маяк"]
    assert len({contact_sheet([label], ["dall-e-2"], [["none"]]) for label in labels}) == len(labels)
