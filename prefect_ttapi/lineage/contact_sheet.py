"""Pictures side by side on one sheet: rows of prompts, columns of whatever is compared."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

CELL: Final = 256  # pixels a side
GAP: Final = 16
LABEL: Final = 220  # pixels of the column with the prompts
HEADER: Final = 56
TEXT_LINES: Final = 9

BACKGROUND: Final = "#ffffff"
EMPTY: Final = "#f1f1f4"
INK: Final = "#1d1d22"


def contact_sheet(
    row_labels: Sequence[str], column_labels: Sequence[str], cells: Sequence[Sequence[bytes | str]]
) -> bytes:
    """A PNG with a picture, or a text saying why there is none, for each row and column.

    Args:
        cells: by row and column, an encoded picture (a thumbnail of about 256 pixels) or a text.
    """
    width = LABEL + len(column_labels) * (CELL + GAP) + GAP
    height = HEADER + len(row_labels) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    small, bold = ImageFont.load_default(size=15), ImageFont.load_default(size=17)
    for column, label in enumerate(column_labels):
        draw.multiline_text((_x(column), GAP), textwrap.fill(label, 28), INK, bold)
    for row, label in enumerate(row_labels):
        draw.multiline_text((GAP, _y(row)), _wrapped(label, 24), INK, small, spacing=6)
        for column, cell in enumerate(cells[row]):
            corner = (_x(column), _y(row))
            draw.rectangle((*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), EMPTY)
            if isinstance(cell, str):
                draw.multiline_text(
                    (corner[0] + GAP, corner[1] + GAP), _wrapped(cell, 26), INK, small, spacing=6
                )
            else:
                _paste(sheet, cell, corner)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _x(column: int) -> int:
    return LABEL + GAP + column * (CELL + GAP)


def _y(row: int) -> int:
    return HEADER + row * (CELL + GAP)


def _wrapped(text: str, characters: int) -> str:
    return "\n".join(textwrap.wrap(text, characters, max_lines=TEXT_LINES, placeholder=" …"))


def _paste(sheet: Image.Image, picture: bytes, corner: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(picture)) as image:
        image.thumbnail((CELL, CELL))
        shown = image.convert("RGBA")
        offset = (corner[0] + (CELL - shown.width) // 2, corner[1] + (CELL - shown.height) // 2)
        sheet.paste(shown, offset, shown)
