"""Text of any alphabet as a part of a file's name: ASCII, bounded, never empty, and safe in URLs."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Final

#: Characters of a slug and of any other value in a key.
LONGEST_SLUG: Final = 60
LONGEST_VALUE: Final = 120

#: Latin letters that Unicode does not take apart.
_LETTERS: Final = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L"}
    | {"đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "TH", "ı": "i", "ħ": "h", "Ħ": "H"}
)


def slug(text: str) -> str:
    """Lower-case words of `text` with dashes between them, at most 60 characters.

    Where letters or symbols have no ASCII form, 8 digits of the text's hash are added, so that two texts stay two.

    >>> slug("A watercolour of Zoë's café"), slug("灯台"), slug("灯台 lighthouse")
    ('a-watercolour-of-zoe-s-cafe', 'f2df7bb7', 'lighthouse-8b3adf44')
    """
    kept, lossless = _ascii(text, "A-Za-z0-9")
    words = kept.lower()
    # cut between words where there is one in the second half
    cut = words[: LONGEST_SLUG - 9]
    if len(words) > len(cut):
        cut = cut[: cut.rfind("-")] if "-" in cut[len(cut) // 2 :] else cut
    return _joined(cut, text, lossless)


def segment(text: str) -> str:
    """`text` as one part of a key between slashes, at most 120 characters; `A-Za-z0-9._~=+-` stay as they
    are.

    Runs of anything else, slashes too, become a dash. As in `slug`, a hash is added where letters were lost,
    and also where the text was cut.

    >>> segment("SKU_12/b v1.2"), segment("../etc"), segment("Größe L")
    ('SKU_12-b-v1.2', 'etc', 'Grosse-L')
    """
    kept, lossless = _ascii(text, "A-Za-z0-9._~=+")
    cut = kept[: LONGEST_VALUE - 9]
    return _joined(cut, text, lossless and cut == kept)


def _ascii(text: str, legal: str) -> tuple[str, bool]:
    """The legal characters of `text` with dashes between them, and whether no letter or digit was lost."""
    apart = unicodedata.normalize("NFKD", text.translate(_LETTERS))
    parts = "".join(part for part in apart if not unicodedata.combining(part))
    # fractions are taken apart with a slash of their own
    lossless = all(sign.isascii() or not _means_something(sign) for sign in parts.replace("\u2044", "/"))
    return re.sub(f"[^{legal}]+", "-", parts).strip("-."), lossless


def _means_something(sign: str) -> bool:
    return sign.isalnum() or unicodedata.category(sign).startswith("S")


def _joined(kept: str, text: str, whole: bool) -> str:
    """`kept`, with a hash of the whole text where it does not stand for all of it."""
    if kept and whole:
        return kept
    digits = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{kept.rstrip('-.')}-{digits}" if kept else digits
