"""Text from outside, made safe to show: bounded, on one line, and inert in HTML and Markdown."""

from __future__ import annotations

import re
import unicodedata
from typing import Final
from urllib.parse import quote

#: Characters of a prompt in a caption and in a table's cell, of an error's message, of an address.
CAPTION: Final = 120
CELL: Final = 80
REASON: Final = 300
ADDRESS: Final = 1_024

#: Characters that reorder or hide what stands around them. Joiners stay: emoji and Persian need them.
_DIRECTION: Final = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

#: What Markdown or HTML could take for markup: every ASCII character but these. Escapes are numbers, which
#: both understand.
_MARKUP: Final = re.compile(r"[\x00-\x7f](?<![A-Za-z0-9 ,.;])")

#: A table's cell is Markdown in one of Prefect's two UIs and plain text in the other: text without any of
#: this means the same in both. An underscore between letters is none of it, names of files are full of them.
_ACTIVE: Final = re.compile(
    r"[\\`*~<>\[\]{}|&!@]|(?<![^\W_])_|_(?![^\W_])|^[-+#=]|^\d+[.)]|https?://|www\.", re.IGNORECASE
)

_LINKED: Final = re.compile(r"(https?|s3|file)://", re.IGNORECASE)


def one_line(text: str, limit: int) -> str:
    """`text` on one line of at most `limit` characters, without characters that control or reorder.

    >>> one_line("a  lighthouse,\\n at dusk", 14)
    'a lighthouse,…'
    """
    # no more than could be needed: a prompt may have 32,000 characters
    start = _DIRECTION.sub("", text[: 8 * limit])
    visible = "".join(
        " " if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char for char in start
    )
    line = " ".join(visible.split())
    if len(line) <= limit and len(text) <= 8 * limit:
        return line
    return line[: limit - 1].rstrip(" \u200d") + "…"


def inert(text: str) -> str:
    """`text` as itself in HTML, in its attributes and in Markdown: nothing in it is markup.

    >>> inert("<b> & *x*")
    '&#60;b&#62; &#38; &#42;x&#42;'
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


def cell(text: str) -> str:
    """`text`, on one line already, for the cell of a table artifact, which may or may not read Markdown.

    >>> cell("a red fox"), cell("a <b>red</b> fox")
    ('a red fox', '`a <b>red</b> fox`')
    """
    return "`" + text.replace("`", "'") + "`" if _ACTIVE.search(text) else text


def address(uri: str) -> str:
    """`uri` with what is no part of an address percent-encoded, or nothing if it is not one to link to.

    >>> address("s3://bucket/a b.png"), address("javascript:alert(1)")
    ('s3://bucket/a%20b.png', '')
    """
    return quote(uri, safe="/:?#@!$&()*+,;=%-._~[]", errors="replace") if _LINKED.match(uri) else ""
