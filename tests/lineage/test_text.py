"""Text from outside is bounded, on one line and inert."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.lineage.markdown import address, cell, inert, one_line


@given(st.text(st.characters()), st.integers(2, 50))
def test_one_line(text: str, limit: int) -> None:
    """Any text becomes one line within the limit, without characters that control or reorder."""
    line = one_line(text, limit)
    assert len(line) <= limit
    assert len(line.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", line)


def test_short_text_stays_itself() -> None:
    """What is short and on one line is shown as it is, joined emoji included; what is cut says so."""
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467 at sea"
    assert one_line(family, 120) == family
    assert one_line("x" * 32_000, 5) == "xxxx…"
    assert one_line("x" + " " * 32_000 + "y", 5) == "x…"
    assert one_line("invoice\u202egnp.exe", 50) == "invoicegnp.exe"


@given(st.text())
def test_inert(text: str) -> None:
    """Escaped text has no character that HTML or Markdown could act on, and reads back as itself."""
    escaped = inert(text)
    assert not re.search(r"[<>\"'`*_\[\](){}|\\~!:@\n]", escaped)
    assert re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), escaped) == text
    if "\x00" not in text and "\r" not in text and text.isprintable():
        assert html.unescape(escaped) == text


@given(st.text().map(lambda text: one_line(text, 80)))
def test_cell(text: str) -> None:
    """A cell is plain text that no Markdown acts on, or a single code span."""
    made = cell(text)
    if made != text:
        assert re.fullmatch("`[^`]*`", made)
        assert made.strip("`").replace("'", "`").strip("`") == text.replace("'", "`").strip("`")
    else:
        assert not re.search(r"[<>*`|\[\]\\&~]|_\W|\W_|^_|_$", made)


@pytest.mark.parametrize(
    "text",
    ["- a", "+ a", "1. a", "2) a", "# a", "> a", "---", "http://a.example", "www.a.example", "a@b.example"],
)
def test_cell_starts_no_block_and_no_link(text: str) -> None:
    """What Markdown takes for a list, heading, quote, rule or link is shown as code."""
    assert cell(text) == f"`{text}`"


def test_file_names_are_plain_in_a_cell() -> None:
    """Where an image is stays readable, and can be copied, in both UIs."""
    uri = "s3://bucket/my_site/date=2026-05-20/a-1_b.png"
    assert cell(uri) == uri
    assert cell("s3://bucket/__init__.png") == "`s3://bucket/__init__.png`"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://cdn.example.com/a.png?v=1&w=2", "https://cdn.example.com/a.png?v=1&w=2"),
        ("file:///out/a b%20c.png", "file:///out/a%20b%20c.png"),
        ("s3://bucket/灯.png", "s3://bucket/%E7%81%AF.png"),
        ('https://a.example/"><script>', "https://a.example/%22%3E%3Cscript%3E"),
        ("javascript:alert(1)", ""),
        ("JavaScript://%0aalert(1)", ""),
        ("data:text/html,x", ""),
        (" https://a.example", ""),
        ("java\nscript:alert(1)", ""),
        ("//a.example", ""),
        ("", ""),
    ],
)
def test_address(uri: str, expected: str) -> None:
    """Only addresses of files and web pages are linked to, and they can't leave their attribute."""
    assert address(uri) == expected
