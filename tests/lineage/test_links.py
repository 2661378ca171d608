"""Links of artifacts: public where a store says where, signed where it asks for it, else the address itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx

from prefect_ttapi import ImageStore
from prefect_ttapi.lineage.links import StoreLinks
from tests.support.s3 import S3Server


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
