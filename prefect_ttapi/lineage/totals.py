"""A batch in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.responses import Usage


class Totals(BaseModel):
    """A batch in figures. Each row counts, duplicates too; what was paid counts where it was paid.

    Attributes:
        rows: requests; the sum of `generated`, `cached`, `failed` and `skipped`.
        images: of all rows; `images_cached` of them were there before.
        without_images: rows that gave none.
        delivered: copies under consumers' names.
        size_bytes: of the images.
        input_tokens, output_tokens, total_tokens: of what this batch paid for.
        api_calls: how often a request was sent.
        seconds: summed over the requests, hence longer than the batch where they ran side by side.
        maybe_paid: rows that may have been paid for without giving images.
        images_by_model: number of images by model.
        errors: number of failed and skipped rows by the error's class.

    >>> (Totals(rows=1, images=2) + Totals(rows=1, images=1)).images
    3
    """

    model_config = ConfigDict(frozen=True)

    rows: int = 0
    generated: int = 0
    cached: int = 0
    failed: int = 0
    skipped: int = 0
    images: int = 0
    images_cached: int = 0
    without_images: int = 0
    delivered: int = 0
    size_bytes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    api_calls: int = 0
    seconds: float = 0.0
    maybe_paid: int = 0
    images_by_model: dict[str, int] = {}
    errors: dict[str, int] = {}

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Totals:
        """The totals of `rows`, which are read one by one."""
        totals = cls()
        for row in rows:
            totals = totals.add(row)
        return totals

    def add(self, row: Row) -> Totals:
        """These totals and one more row."""
        images = len(row.images)
        paid = row.usage if row.usage and row.api_calls and row.status != "cached" else Usage()
        return self + Totals(
            rows=1,
            **{row.status: 1},
            images=images,
            images_cached=images if row.status == "cached" else 0,
            without_images=not images,
            delivered=len(row.delivered),
            size_bytes=sum(image.size_bytes for image in row.images),
            input_tokens=paid.input_tokens,
            output_tokens=paid.output_tokens,
            total_tokens=paid.total_tokens,
            api_calls=row.api_calls,
            seconds=row.seconds,
            maybe_paid=bool(row.maybe_paid),
            images_by_model={row.model: images} if images else {},
            errors={row.error_type: 1} if row.error_type else {},
        )

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            **{name: _sum(getattr(self, name), getattr(other, name)) for name in Totals.model_fields}
        )


def _sum(one: Any, other: Any) -> Any:
    return dict(Counter(one) + Counter(other)) if isinstance(one, dict) else one + other
