"""Draw pictures side by side on one sheet: rows of prompts, columns of what is compared."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

from PIL import Image, ImageDraw

from prefect_ttapi.images.lettering import Lettering, shortened

CELL: Final = 256  # pixels a side
GAP: Final = 16
LABEL: Final = 220  # pixels of the column with the prompts
HEADER: Final = 56
TEXT_LINES: Final = 9
HEADER_LINES: Final = 2

BACKGROUND: Final = "#ffffff"
EMPTY: Final = "#f1f1f4"
INK: Final = "#1d1d22"


def contact_sheet(
    row_labels: Sequence[str], column_labels: Sequence[str], cells: Sequence[Sequence[bytes | str]]
) -> bytes:
    """Return a PNG with a picture, or a text saying why there is none, for each row and column.

    Args:
        row_labels: prompts, wrapped and cut.
        column_labels: what is compared.
        cells: by row and column, an encoded picture (a thumbnail of about 256 pixels) or a text.
    """
    width = LABEL + len(column_labels) * (CELL + GAP) + GAP
    height = HEADER + len(row_labels) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        _write(draw, (_x(column), GAP), label, 17, CELL, HEADER_LINES)
    for row, label in enumerate(row_labels):
        _write(draw, (GAP, _y(row)), label, 15, LABEL - GAP)
        for column, cell in enumerate(cells[row]):
            corner = (_x(column), _y(row))
            draw.rectangle((*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), EMPTY)
            if isinstance(cell, str):
                _write(draw, (corner[0] + GAP, corner[1] + GAP), cell, 15, CELL - 2 * GAP)
            else:
                _paste(sheet, cell, corner)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _x(column: int) -> int:
    return LABEL + GAP + column * (CELL + GAP)


def _y(row: int) -> int:
    return HEADER + row * (CELL + GAP)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    width: int,
    most: int = TEXT_LINES,
) -> None:
    lettering = Lettering(text, size)
    lettering.write_lines(draw, *corner, shortened(lettering.wrapped(width), most), INK)


def _paste(sheet: Image.Image, picture: bytes, corner: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(picture)) as image:
        image.thumbnail((CELL, CELL))
        shown = image.convert("RGBA")
        offset = (corner[0] + (CELL - shown.width) // 2, corner[1] + (CELL - shown.height) // 2)
        sheet.paste(shown, offset, shown)
