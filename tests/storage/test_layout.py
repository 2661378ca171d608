"""Every key of a store is made and read in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefect_ttapi
from prefect_ttapi.images.headers import EXTENSIONS
from prefect_ttapi.storage import layout

PACKAGE = Path(prefect_ttapi.__file__).parent

#: How a key or an address begins.
BEGINNINGS = (
    "s3://",
    "images/",
    "/images/",
    "ledger/",
    "batches/",
    "/batches/",
    "manifest.",
    "/manifest.",
    ".metadata",
)

sha256s = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(sha256s, st.sampled_from(sorted(EXTENSIONS)), st.text("abc/:%.", max_size=9))
def test_image_keys_are_read_as_they_were_made(sha256: str, media_type: str, store: str) -> None:
    """Key and address of an image give its SHA-256, extension and store again."""
    key = layout.image_key(sha256, media_type)
    assert layout.image_in(key) == (sha256, EXTENSIONS[media_type])
    assert layout.split_at(f"s3://{store}/{key}", layout.IMAGES) == (f"s3://{store}", key)


@given(sha256s, st.sampled_from(["https://api.ttapi.io", "sandbox", "http://localhost:8080/proxy"]))
def test_ledger_keys_are_read_as_they_were_made(request_hash: str, origin: str) -> None:
    """A document's key gives the API's origin and the request's hash again."""
    slug = layout.slug_of(origin)
    key = layout.ledger_key(slug, request_hash)
    assert key.startswith(layout.ledger_folder(origin))
    assert layout.document_in(key) == (slug, request_hash)
    assert layout.origin_of_slug(slug) == origin


@pytest.mark.parametrize(
    "key",
    [
        "images/a.png",
        f"images/{'A' * 64}.png",
        f"images/{'a' * 64}.png/x",
        f"ledger/{'a' * 64}.json",
        f"ledger/a/b/{'a' * 64}.json",
        layout.PROBE,
        "batches/../x",
    ],
)
def test_other_keys_are_nobodys(key: str) -> None:
    """What only looks like a key of the store's own is none."""
    assert layout.image_in(key) is layout.document_in(key) is layout.run_in(key) is None


def test_nothing_else_spells_keys() -> None:
    """No other module has a string that begins like a key or an address of a bucket."""
    spelt = {
        f"{path.relative_to(PACKAGE)}:{line}: {text!r}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "layout.py"
        for line, text in strings(ast.parse(path.read_text()))
        if text.startswith(BEGINNINGS)
    }
    assert spelt == set()


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """All strings but those that stand alone, which are documentation."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value
