"""Sum up a batch in figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.results import Usage

#: Percent of the answers.
PERCENTILES: Final = (50, 90, 99)

_SHORTEST: Final = 0.001  # seconds
_WIDER: Final = 1.06
_BUCKETS: Final = 320  # more than a day


def bucket(seconds: float) -> int:
    """Return which bucket holds this many seconds.

    >>> bucket(0.0), bucket(1.0), bucket(60.0), bucket(1e9)
    (0, 119, 189, 320)
    """
    if seconds <= _SHORTEST:
        return 0
    return min(math.ceil(math.log(seconds / _SHORTEST, _WIDER)), _BUCKETS)


def percentile(counts: Mapping[int, int], share: float) -> float:
    """Return the seconds that `share` percent of the answers took at most, 3 % off at the worst, in three digits.

    Args:
        counts: answers by bucket; there must be some.
        share: percent of the answers.

    >>> percentile({bucket(2.0): 98, bucket(40.0): 2}, 50), percentile({bucket(2.0): 98, bucket(40.0): 2}, 99)
    (2.01, 39.2)
    """
    rank = math.ceil(sum(counts.values()) * share / 100)
    for number in sorted(counts):
        rank -= counts[number]
        if rank <= 0:
            break
    return float(f"{_SHORTEST * _WIDER ** (number - 0.5):.3g}")


class Totals(BaseModel):
    """A batch in figures. Each row counts, duplicates too; what was paid counts where it was paid.

    Attributes:
        rows: requests; the sum of `generated`, `cached`, `failed` and `skipped`.
        images: of all rows; `images_cached` of them were there before.
        without_images: rows that gave none.
        delivered: copies under consumers' names.
        size_bytes: of the images.
        input_tokens, output_tokens, total_tokens: of what this batch paid for.
        tokens_saved: of what was paid for before.
        usd, usd_saved: the same in money, for images that came; None where no row has a price.
        api_calls: how often a request was sent.
        seconds: summed over the requests, hence longer than the batch where they ran side by side.
        answered: rows that this batch paid for and got images; `answer_seconds` is how long these took.
        sent_from, sent_until: when the first of them was sent, and the last one answered.
        latencies: by model, how many of them took how long: counts by bucket, see `latency`.
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
    tokens_saved: int = 0
    usd: float | None = None
    usd_saved: float | None = None
    api_calls: int = 0
    seconds: float = 0.0
    answered: int = 0
    answer_seconds: float = 0.0
    sent_from: datetime | None = None
    sent_until: datetime | None = None
    latencies: dict[str, dict[int, int]] = {}
    maybe_paid: int = 0
    images_by_model: dict[str, int] = {}
    errors: dict[str, int] = {}

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Totals:
        """Return the totals of `rows`, which are read one by one."""
        totals = cls()
        for row in rows:
            totals = totals.add(row)
        return totals

    def add(self, row: Row, usd: float | None = None) -> Totals:
        """Return these totals and one more row.

        Args:
            row: to be added.
            usd: what its images cost, or would have cost; None where nobody knows.
        """
        figures = _figures(row, usd)
        return self.model_copy(
            update={name: _joined(name, getattr(self, name), figures[name]) for name in figures}
        )

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            **{name: _joined(name, getattr(self, name), getattr(other, name)) for name in Totals.model_fields}
        )

    @property
    def concurrency(self) -> float | None:
        """How many requests were answered side by side, on average; None where nothing was paid for."""
        if self.sent_from is None or self.sent_until is None:
            return None
        seconds = (self.sent_until - self.sent_from).total_seconds()
        return self.answer_seconds / seconds if seconds > 0 else None

    def latency(self, model: str) -> dict[str, float]:
        """Return seconds that half, 90 % and 99 % of the model's answers took at most, to 3 %; empty without answers.

        >>> Totals(latencies={"dall-e-2": {bucket(4.0): 9, bucket(60.0): 1}}).latency("dall-e-2")
        {'p50': 4.04, 'p90': 4.04, 'p99': 58.9}
        """
        counts = self.latencies.get(model)
        return {f"p{share}": percentile(counts, share) for share in PERCENTILES} if counts else {}


def _figures(row: Row, usd: float | None) -> dict[str, Any]:
    """Return what one row adds, by the name of the figure."""
    images, usage = len(row.images), row.usage or Usage()
    paid = bool(row.api_calls) and row.status != "cached"
    return {
        "rows": 1,
        row.status: 1,
        "images": images,
        "without_images": int(not images),
        "delivered": len(row.delivered),
        "size_bytes": sum(image.size_bytes for image in row.images),
        "api_calls": row.api_calls,
        "seconds": row.seconds,
        "maybe_paid": int(bool(row.maybe_paid) and not images),
        "images_by_model": {row.model: images} if images else {},
        "errors": {row.error_type: 1} if row.error_type else {},
        **(_paid(usage) if paid else {"images_cached": images, "tokens_saved": usage.total_tokens}),
        **({"usd" if paid else "usd_saved": usd} if images else {}),
        **(_answered(row) if images and paid else {}),
    }


def _paid(usage: Usage) -> dict[str, int]:
    return {name: getattr(usage, name) for name in ("input_tokens", "output_tokens", "total_tokens")}


def _answered(row: Row) -> dict[str, Any]:
    answered = {
        "answered": 1,
        "answer_seconds": row.seconds,
        "latencies": {row.model: {bucket(row.seconds): 1}},
    }
    if row.created_at is None:
        return answered
    until = row.created_at.astimezone(UTC)
    return answered | {"sent_from": until - timedelta(seconds=row.seconds), "sent_until": until}


_JOINING: Final[dict[str, Callable[[Any, Any], Any]]] = {"sent_from": min, "sent_until": max}


def _joined(name: str, one: Any, other: Any) -> Any:
    if one is None or other is None:
        return one if other is None else other
    return _JOINING.get(name, _sum)(one, other)


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return one | {name: _sum(one[name], more) if name in one else more for name, more in other.items()}
    return one + other
