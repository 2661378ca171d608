"""Every key of a store is made and read in one place."""

from __future__ import annotations

import ast
import re
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


@pytest.mark.parametrize(
    ("address", "way_out"),
    [
        ("s3:/pictures/2031", "did you mean s3://pictures/2031 ?"),
        ("s3:pictures", "did you mean s3://pictures ?"),
        ("S3:/pictures", "did you mean s3://pictures ?"),
        ("s3a://pictures/x", "did you mean s3://pictures/x ?"),
        ("gs://pictures", "as far as they speak S3, by endpoint_url"),
        ("az://pictures", "as far as they speak S3, by endpoint_url"),
        ("abfss:pictures", "as far as they speak S3, by endpoint_url"),
        ("https://pictures.s3.eu-west-3.amazonaws.com/x", "goes into endpoint_url, and the bucket into url"),
        ("http:/minio:9000/pictures", "goes into endpoint_url, and the bucket into url"),
        ("ftp://pictures", "give a folder, file:///folder or s3://bucket/prefix"),
        ("file:pictures", "give a folder, file:///folder or s3://bucket/prefix"),
    ],
)
def test_an_address_of_another_kind_is_no_folder(address: str, way_out: str) -> None:
    """What looks like a service's address is never taken for a folder here; the line says what is meant."""
    with pytest.raises(ValueError, match=re.escape(way_out)) as refused:
        layout.normalised(address)
    assert "give a folder, file:///folder or s3://bucket/prefix" in str(refused.value)


def test_what_a_folder_or_a_bucket_may_be_called() -> None:
    """A folder's name may have a colon, and the scheme any case."""
    assert layout.normalised("/srv/2031-05-01T12:00") == "/srv/2031-05-01T12:00"
    assert layout.normalised("shots:v2").endswith("/shots:v2")
    assert layout.normalised("S3://pictures/A") == layout.object_uri("S3://pictures/A") == "s3://pictures/A"
    assert layout.is_s3("S3://pictures")


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
