"""What is said of a delivered image, and of a batch, in assets and events."""

from __future__ import annotations

from typing import Any, Final, Protocol

from prefect_ttapi.lineage.text import one_line
from prefect_ttapi.lineage.totals import Totals
from prefect_ttapi.responses import DeliveredImage, Generation

#: Characters of a prompt in an event; the whole one is in the ledger, under the request hash.
PROMPT: Final = 1_000


class Report(Protocol):
    """What became of a batch, as far as assets and events tell of it."""

    @property
    def name(self) -> str: ...
    @property
    def totals(self) -> Totals: ...
    @property
    def manifest_uri(self) -> str: ...
    @property
    def gallery_uri(self) -> str | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def ok(self) -> bool: ...


def image_facts(generation: Generation, copy: DeliveredImage) -> dict[str, Any]:
    """Where a delivered image comes from, JSON-able, prompts cut to 1,000 characters; what isn't known is left out."""
    image = next(image for image in generation.images if image.uri == copy.source_uri)
    facts = {
        "request_hash": generation.request_hash,
        "model": generation.request.model,
        "api_origin": generation.api_origin,
        "request_id": generation.request_id,
        "paid_in_flow_run": generation.flow_run_id,
        "paid_in_task_run": generation.task_run_id,
        "sha256": copy.sha256,
        "size_bytes": copy.size_bytes,
        "url": copy.url,
        "source_uri": copy.source_uri,
        "media_type": copy.media_type,
        "width": copy.width,
        "height": copy.height,
        "rendition": copy.rendition,
        "recipe": copy.recipe,
        "prompt": one_line(generation.request.prompt, PROMPT),
        "revised_prompt": image.revised_prompt and one_line(image.revised_prompt, PROMPT),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def batch_facts(report: Report) -> dict[str, Any]:
    """A batch in figures, JSON-able; no prompt is in it, and it does not grow with the batch."""
    return {
        "name": report.name,
        "ok": report.ok,
        "manifest_uri": report.manifest_uri,
        "gallery_uri": report.gallery_uri,
        "seconds": report.seconds,
        "totals": report.totals.model_dump(mode="json"),
    }
