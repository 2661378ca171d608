"""What is found wrong with a batch before anything is paid for."""

from __future__ import annotations

from datetime import UTC, datetime

from prefect_ttapi.batch.intake import KeyCheck
from prefect_ttapi.batch.items import Item
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.store import ImageStore


def test_keys_are_judged_where_they_will_be() -> None:
    """A key that is legal by itself, and too long below the prefix that is delivered to, is found before paying."""
    long, short = (
        ImageStore(url=f"s3://pictures/{'p' * length}", access_key_id="k", secret_access_key="s")
        for length in (300, 30)
    )
    values = {name: name * 120 for name in "abcdef"}
    template = "/".join(f"{{{name}}}" for name in values) + "/{index}.{ext}"
    item = Item(0, ImageRequest(prompt="a cat"), values)
    problems = [
        KeyCheck(template, "b", datetime.now(UTC), address=place.objects.uri).problem(item)
        for place in (long, short)
    ]
    assert problems[1] is None
    assert "1,024 bytes" in problems[0]
