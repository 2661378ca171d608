"""A batch's units: a request at its place, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefect_ttapi.errors import LaneLostError
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest


@dataclass(frozen=True)
class Item:
    """A legal request at its place in the batch, with the values of its key template."""

    row: int
    request: ImageRequest
    values: dict[str, Any] = field(default_factory=dict)
    may_pay: bool = True  # False: the budget is used up, only a record will do
    known_absent: bool = False  # True: a listing showed no ledger record


@dataclass(frozen=True)
class Done:
    """A request's row, its thumbnails (WebP), and how many images it may have cost."""

    row: Row
    thumbnails: tuple[bytes | None, ...] = ()
    images_paid: int = 0


def row_of(item: Item, api_origin: str | None) -> Row:
    """Return the item's row as long as nothing has become of it: skipped."""
    return Row(
        row=item.row,
        status="skipped",
        request=item.request,
        request_hash=item.request.request_hash,
        api_origin=api_origin,
        values=item.values,
    )


def skipped(item: Item, api_origin: str | None, reason: str | None, error_type: str | None) -> Done:
    """Return the item as one that was never sent, and why."""
    return Done(row_of(item, api_origin).model_copy(update={"error": reason, "error_type": error_type}))


def perhaps_under_way(item: Item, api_origin: str | None, error_type: str | None) -> Done:
    """Return the item as one that may have been sent when nobody waited for it any longer."""
    return _unsure(
        item,
        api_origin,
        "it was under way when the batch ended: if it is answered yet, the ledger will know",
        error_type,
    )


def lost(item: Item, api_origin: str | None, why: str) -> Done:
    """Return the item as one whose task run broke down, so that what became of it is not known."""
    return _unsure(item, api_origin, f"its task run broke down: {why}", LaneLostError.__name__)


def _unsure(item: Item, api_origin: str | None, error: str, error_type: str | None) -> Done:
    update = {"status": "failed", "error": error, "error_type": error_type, "maybe_paid": (error,)}
    return Done(row_of(item, api_origin).model_copy(update=update), images_paid=item.request.n)
