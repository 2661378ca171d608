"""Images and rows for the lineage tests: real files drawn with Pillow."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from PIL import Image

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.report import Totals
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import DeliveredImage, StoredImage, Usage
from tests.support.pictures import saved


def picture(width: int = 64, height: int = 48, mode: str = "RGB", form: str = "PNG") -> bytes:
    """An image whose left is dark and whose right is light, so that a thumbnail can be recognised."""
    gradient = Image.linear_gradient("L").rotate(90).resize((width, height))
    return saved(gradient.convert(mode), form)


def stored(index: int = 0, **changed: object) -> StoredImage:
    """A stored image as a local store would name it."""
    sha256 = f"{index:064x}"
    facts: dict[str, object] = {
        "uri": f"file:///out/images/{sha256}.png",
        "sha256": sha256,
        "size_bytes": 1_000 + index,
        "media_type": "image/png",
        "width": 1024,
        "height": 1024,
        "index": index,
    }
    return StoredImage.model_validate(facts | changed)


def generated(row: int = 0, prompt: str = "a lighthouse", count: int = 1, **changed: object) -> Row:
    """A row as a batch writes it for an answered and delivered request."""
    request = ImageRequest(prompt=prompt, model="gpt-image-2", size="1024x1024")
    pictures = tuple(stored(row * 10 + n) for n in range(count))
    facts: dict[str, object] = {
        "row": row,
        "status": "generated",
        "request": request,
        "request_hash": request.request_hash,
        "images": pictures,
        "delivered": tuple(
            DeliveredImage(
                uri=f"file:///out/site/lighthouse-{row}-{image.index}.png",
                sha256=image.sha256,
                source_uri=image.uri,
            )
            for image in pictures
        ),
        "usage": Usage(input_tokens=9, output_tokens=4160, total_tokens=4169),
        "api_calls": 1,
        "seconds": 21.5,
        "created_at": datetime(2026, 5, 20, 12, 0, tzinfo=UTC),
        "api_origin": "https://api.ttapi.io",
        "flow_run_id": "5f0c1c1e-0000-4000-8000-000000000001",
    }
    return Row.model_validate(facts | changed)


def failed(row: int = 0, prompt: str = "a lighthouse", **changed: object) -> Row:
    """A row as a batch writes it for a request that was refused."""
    request = ImageRequest(prompt=prompt, model="gpt-image-2")
    facts: dict[str, object] = {
        "row": row,
        "status": "failed",
        "request": request,
        "request_hash": request.request_hash,
        "error": "the prompt was refused (HTTP 400, outcome: refused for good)",
        "error_type": "ModerationError",
        "api_calls": 1,
    }
    return Row.model_validate(facts | changed)


def manifest_of(rows: Iterable[Row]) -> bytes:
    """The manifest of a batch with these rows."""
    return b"".join(row.line() for row in rows)


def totals_of(rows: Iterable[Row], usd: float | None = None) -> Totals:
    """The totals of a batch with these rows, each of which costs so much."""
    totals = Totals()
    for row in rows:
        totals = totals.add(row, usd)
    return totals
