"""What is shown: text that is bounded, on one line and inert; links that open; prompts only where they may be."""

from __future__ import annotations

import html
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi import ImageStore
from prefect_ttapi.lineage.shown import Shown, StoreLinks, address, cell, inert, one_line
from tests.support.rows import failed, generated
from tests.support.s3 import S3Server


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


def test_where_a_browser_finds_an_object(s3_server: S3Server, tmp_path: Path) -> None:
    """Of several stores the one that holds an object says where it is found; nobody's objects stay as they are."""
    private, signing, public = (
        ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(), **more)
        for more in ({}, {"signed_links": 600}, {"public_base_url": "https://cdn.example.com"})
    )
    folder = ImageStore(url=str(tmp_path), signed_links=600)
    links = StoreLinks(None, private, public, signing, folder)
    for uri in (private.uri("a.png"), folder.uri("a.png"), "s3://elsewhere/a.png"):
        assert links.to(uri) == uri
    assert links.to(public.uri("b c.png")) == "https://cdn.example.com/b%20c.png"
    assert links.end is None

    before = datetime.now(UTC)
    signed = links.to(signing.write("page.html", b"<p>", "text/html"))
    assert httpx.get(signed, trust_env=False).content == b"<p>"
    assert links.end is not None
    assert before <= links.end - timedelta(seconds=600) <= datetime.now(UTC)
    first = links.end
    links.to(signing.uri("later.html"))
    assert links.end == first


def test_what_may_not_be_shown() -> None:
    """Prompt, revised prompt, an illegal item's fields and quotes in errors give way to the request's hash."""
    row = generated(0, "a red cart")
    image = row.images[0].model_copy(update={"revised_prompt": "a red cart, as the model sees it"})
    row = row.model_copy(update={"images": (image,), "maybe_paid": ("run 1: a red cart was cut",)})
    shown_of = Shown(prompts=False).row
    shown = shown_of(row)
    assert "a red cart" not in shown.model_dump_json()
    assert shown.prompt == f"request {row.request_hash[:12]}"
    assert shown.request_hash == row.request_hash
    assert shown_of(shown) == shown
    refused = shown_of(failed(1, "red", error="red is refused, as are reddish ones"))
    assert refused.error == "prompt not recorded is refused, as are reddish ones"
