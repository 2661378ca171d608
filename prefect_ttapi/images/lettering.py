"""Draw text of any script, each letter in a font that has it.

`letters.ttf` beside this file has the letters of most European languages; other scripts are looked for in the fonts of
the system. A character that no font has is drawn as a box with its code point in hex: nothing is dropped, and different
texts look different.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Final

from PIL import ImageFont, features
from PIL.ImageDraw import ImageDraw as Pen

Colour = tuple[int, int, int] | str

#: From one line to the next, in sizes of the letters.
LINE: Final = 1.25

EUROPEAN: Final = str(Path(__file__).with_name("letters.ttf"))

#: Files of fonts with many scripts, or with one that others lack; of those that a system has, the first are preferred.
_SYSTEM: Final = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "PingFang.ttc", "Arial Unicode.ttf",
    "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf",
    "NotoSansBengali-Regular.ttf", "NotoSansTamil-Regular.ttf", "NotoSansThai-Regular.ttf",
    "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "FreeSans.ttf", "NotoEmoji-Regular.ttf", "Symbola_hint.ttf",
    "unifont.otf", "unifont_upper.otf",
)  # fmt: skip

#: Whether Pillow can join letters and write from right to left.
_SHAPES: Final = features.check("raqm")
_JOINERS: Final = "\u200c\u200d"
_SELECTOR: Final = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")


class Lettering:
    """One text at one size, to be used in one thread.

    Args:
        text: to be written, in one line or several.
        size: height of the letters, pixels.
        fonts: files to choose from; None: those of the package and of the system.

    >>> Lettering("eine lange Straße", 20).wrapped(120)
    ['eine lange', 'Straße']
    """

    def __init__(self, text: str, size: float, fonts: Sequence[str] | None = None) -> None:
        self.text = _plain(text)
        self.size = size
        self._fonts = _ranked(self.text, installed() if fonts is None else fonts)
        # faces of its own: threads may not share one, and opening takes 0.1 ms
        self._face = cache(lambda font: ImageFont.truetype(font, size))

    def width(self, line: str) -> float:
        """Return the width of a line in pixels."""
        return sum(self._width(piece, font) for piece, font in self._pieces(line))

    def wrapped(self, width: float) -> list[str]:
        """Return the text in lines of at most `width` pixels; longer words are broken."""
        width_of = cache(self.width)  # a line is as wide as its parts together: measuring is slow
        lines, used = [""], 0.0
        for word in self.text.split():
            for position, part in enumerate([word] if width_of(word) <= width else _clusters(word)):
                joined = f" {part}" if position == 0 and lines[-1] else part
                if used + width_of(joined) <= width:
                    lines[-1] += joined
                    used += width_of(joined)
                else:
                    lines.append(part)
                    used = width_of(part)
        return lines

    def write(self, pen: Pen, left: float, base: float, line: str, fill: Colour) -> None:
        """Write one line whose letters stand on `base`, from `left` on."""
        for piece, font in self._pieces(line):
            if font is None:
                self._write_boxes(pen, left, base, piece, fill)
            else:
                pen.text((left, base), piece, fill=fill, font=self._face(font), anchor="ls")
            left += self._width(piece, font)

    def write_lines(self, pen: Pen, left: float, top: float, lines: Sequence[str], fill: Colour) -> None:
        """Write lines below each other, the first one below `top`."""
        for number, line in enumerate(lines):
            self.write(pen, left, top + self.size * (0.95 + LINE * number), line, fill)

    def _pieces(self, line: str) -> Iterator[tuple[str, str | None]]:
        """Yield pieces, each with the font that has all of it, or None."""
        if len(self._fonts) == 1 and not _lacking(self._fonts[0], self.text):
            yield line, self._fonts[0]
            return
        piece, last = "", None
        for cluster in _clusters(line):
            # spaces and signs stay with the word before: from right to left they stand in its middle
            order = self._fonts if last is None or cluster[0].isalnum() else (last, *self._fonts)
            font = next((font for font in order if not _lacking(font, cluster)), None)
            if piece and font != last:
                yield piece, last
                piece = ""
            piece, last = piece + cluster, font
        yield piece, last

    def _width(self, piece: str, font: str | None) -> float:
        if font is None:
            return sum(map(self._box_width, _inked(piece)))
        return self._face(font).getlength(piece)

    def _box_width(self, char: str) -> float:
        return self.size * (0.3 * len(_digits(char)[0]) + 0.25)

    def _write_boxes(self, pen: Pen, left: float, base: float, piece: str, fill: Colour) -> None:
        """Draw each character as a box with its code point in two rows."""
        face = ImageFont.truetype(EUROPEAN, self.size * 0.45)
        gap = self.size * 0.05
        for char in _inked(piece):
            right = left + self._box_width(char)
            box = (left + gap, base - self.size * 0.78, right - gap, base + self.size * 0.17)
            pen.rectangle(box, outline=fill)
            for row, digits in zip((0.36, -0.07), _digits(char), strict=True):
                middle = ((left + right) / 2, base - self.size * row)
                pen.text(middle, digits, fill=fill, font=face, anchor="ms")
            left = right


def shortened(lines: Sequence[str], most: int) -> list[str]:
    """Return at most so many lines; the last one says where more were.

    >>> shortened(["one", "two", "three"], 2)
    ['one', 'two ...']
    """
    return list(lines) if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} ..."]


def _plain(text: str) -> str:
    """Return `text` composed, with spaces for controls, and without what has no shape at all."""
    plain = ""
    for char in unicodedata.normalize("NFC", text):
        category = unicodedata.category(char)
        if category != "Cf" or (_SHAPES and char in _JOINERS):
            plain += " " if category == "Cc" else char
    return plain


def _clusters(text: str) -> list[str]:
    """Return the letters of `text`, each with the marks that stand on it."""
    found: list[str] = []
    for char in text:
        if found and (char in _JOINERS or found[-1][-1] == "\u200d" or unicodedata.category(char)[0] == "M"):
            found[-1] += char
        else:
            found.append(char)
    return found


def _inked(text: str) -> list[str]:
    """Return the characters that a font must have: not spaces, joiners, and selectors of variants."""
    return [char for char in text if not (char.isspace() or char in _JOINERS or _SELECTOR.match(char))]


def _digits(char: str) -> tuple[str, str]:
    code = f"{ord(char):04X}"
    code = code.zfill(len(code) + len(code) % 2)
    return code[: len(code) // 2], code[len(code) // 2 :]


def _ranked(text: str, fonts: Sequence[str]) -> tuple[str, ...]:
    """Return the fonts, those first that lack least of `text`; one will do if it lacks nothing."""
    lacking: dict[str, int] = {}
    for font in fonts:
        lacking[font] = _lacking(font, text)
        if not lacking[font]:
            return (font,)
    return tuple(sorted(lacking, key=lambda font: lacking[font]))


def _lacking(font: str, text: str) -> int:
    return sum(not _has(font, char) for char in set(_inked(text)))


@lru_cache(100_000)
def _has(font: str, char: str) -> bool:
    if unicodedata.category(char) == "Cs" or (not _SHAPES and unicodedata.bidirectional(char) in ("R", "AL")):
        return False
    # for what a font lacks it draws one and the same sign
    face = ImageFont.truetype(font, 16)
    drawn, missing = (face.getmask(each) for each in (char, "\U0010ffff"))
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


@cache
def installed() -> tuple[str, ...]:
    """Return the fonts of the package, and those of the system that are known to have other scripts."""
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    folders = [Path(folder, "fonts") for folder in ("~/.local/share", *shared.split(":"))]
    folders += [Path(folder, "Library/Fonts") for folder in ("~", "/", "/System")]
    found = {
        name: str(Path(folder, name))
        for top in folders
        for folder, _, names in os.walk(top.expanduser())
        for name in names
    }
    return (EUROPEAN, *(found[name] for name in _SYSTEM if name in found))
