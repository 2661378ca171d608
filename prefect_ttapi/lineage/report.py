"""Report what became of a batch, in figures and row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import islice, zip_longest
from typing import Any, BinaryIO, Final, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from prefect_ttapi.errors import BatchError, BudgetExceeded, StoreError
from prefect_ttapi.lineage.manifest import CACHED, TOKENS, Row, RowFile, Rows
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.results import Usage
from prefect_ttapi.storage.layout import BATCHES, MANIFEST, UNCHANGED, split_at, unchanged_in
from prefect_ttapi.storage.store import ImageStore

#: How many failures an error message quotes.
EXAMPLES: Final = 3

#: Percent of the answers.
PERCENTILES: Final = (50, 90, 99)

_SHORTEST: Final = 0.001  # seconds
_WIDER: Final = 1.06
_BUCKETS: Final = 320  # more than a day

#: Fields that are equal where a row failed again, and how many such rows may be in a batch that changed nothing.
_ASKED: Final = ("row", "status", "request_hash", "request", "given", "values", "error_type")
_FAILED_AGAIN: Final = 100


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
        with_credentials, without_credentials: images with and without Content Credentials, as far as anybody looked.
        unmarked: delivered files that say nowhere that a model made them, as far as anybody looked.
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

    >>> row = Row(row=0, status="failed", error_type="StoreError")
    >>> Totals(rows=1, images=2).add(row).model_dump(exclude_defaults=True)
    {'rows': 2, 'failed': 1, 'images': 2, 'without_images': 1, 'errors': {'StoreError': 1}}
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
    with_credentials: int = 0
    without_credentials: int = 0
    unmarked: int = 0
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
    looked_at = [image.marks for image in row.images if image.marks is not None]
    signed = sum("credentials" in marks for marks in looked_at)
    paid = bool(row.api_calls) and row.status != "cached"
    saved = {"images_cached": images, "tokens_saved": usage.total_tokens}
    figures = {
        "rows": 1,
        row.status: 1,
        "images": images,
        "without_images": int(not images),
        "delivered": len(row.delivered),
        "with_credentials": signed,
        "without_credentials": len(looked_at) - signed,
        "unmarked": sum(copy.marks == () for copy in row.delivered),
        "size_bytes": sum(image.size_bytes for image in row.images),
        "api_calls": row.api_calls,
        "seconds": row.seconds,
        "maybe_paid": int(bool(row.maybe_paid) and not images),
        "images_by_model": {row.model: images} if images else {},
        "errors": {row.error_type: 1} if row.error_type else {},
        "usd" if paid else "usd_saved": usd if images else None,
    }
    answered = _answered(row) if images and paid else {}
    return figures | (usage.model_dump(include=set(TOKENS)) if paid else saved) | answered


def _credentials(totals: Totals) -> str:
    """Return how many images have Content Credentials, where some have."""
    if not totals.with_credentials:
        return ""
    without = f", {totals.without_credentials:,} without" if totals.without_credentials else ""
    return f" ({totals.with_credentials:,} with credentials{without})"


def _answered(row: Row) -> dict[str, Any]:
    until = row.created_at and row.created_at.astimezone(UTC)
    return {
        "answered": 1,
        "answer_seconds": row.seconds,
        "latencies": {row.model: {bucket(row.seconds): 1}},
        "sent_from": until and until - timedelta(seconds=row.seconds),
        "sent_until": until,
    }


def _joined(name: str, one: Any, other: Any) -> Any:
    if one is None or other is None:
        return one if other is None else other
    if isinstance(one, datetime):
        return (min if name == "sent_from" else max)(one, other)
    if isinstance(one, dict):
        both = {key: _joined(key, one[key], other[key]) for key in one.keys() & other.keys()}
        return one | other | both
    return one + other


def as_cached(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines that a manifest has if its batch finds all images of this one paid for.

    >>> row = Row(row=0, status="generated", api_calls=2, seconds=1.5)
    >>> cached = json.loads(next(as_cached([row.line()])))
    >>> cached["status"], cached["api_calls"], cached["seconds"]
    ('cached', 0, 0.0)
    """
    for line in filter(bytes.strip, lines):
        yield (
            json.dumps(json.loads(line) | CACHED, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        )


def failed_again(lines: Iterable[bytes], earlier: Iterable[bytes]) -> list[bytes] | None:
    """Return those of `lines` that failed again, if an earlier manifest has the same rows but for these.

    None where anything has changed: a row's images, copies or values, what is asked, or how many failed.
    """
    again: list[bytes] = []
    for line, other in zip_longest(lines, filter(bytes.strip, earlier)):
        try:
            one, before = json.loads(line or b"null"), json.loads(other or b"null")
            if one == before | CACHED:
                continue
            same = not (one["images"] or before["images"]) and all(
                one[name] == before[name] for name in _ASKED
            )
        except (KeyError, TypeError, ValueError):
            return None  # one has more rows, or something is no row
        if not same or len(again) == _FAILED_AGAIN:
            return None
        again.append(line)
    return again


class Unchanged(BaseModel):
    """What a batch leaves if nothing has changed since an earlier one, whose rows, pages and manifest stand for it.

    Attributes:
        same_as: the earlier batch's folder; it has a manifest of its own.
        name: the batch's name.
        api_origin: whose answers they are.
        ended: when this batch ended.
        totals: of this batch.
        failed_again: rows that have no images, in either batch.
    """

    model_config = ConfigDict(frozen=True)

    same_as: str = Field(pattern=f"^{BATCHES}[^.]")
    name: str
    api_origin: str
    ended: datetime
    totals: Totals
    failed_again: tuple[Row, ...] = ()

    @classmethod
    def read(cls, store: ImageStore, folder: str) -> Self | None:
        """Return what the batch of this folder left, or None where it is gone, or makes no sense."""
        found = store.read(f"{folder}/{UNCHANGED}")
        try:
            return cls.model_validate_json(found) if found else None
        except ValidationError:
            return None

    @property
    def id(self) -> str:
        """The earlier batch's id on a command line."""
        return self.same_as.removeprefix(BATCHES)

    def lines(self, store: ImageStore) -> Generator[bytes]:
        """Yield the lines that the batch's own manifest would have. StoreError: the earlier batch is gone."""
        own = {row.row: row.line() for row in self.failed_again}
        with store.open(store.uri(f"{self.same_as}/{MANIFEST}")) as earlier:
            for line in as_cached(earlier):
                yield own.get(json.loads(line)["row"], line) if own else line


class BatchReport(BaseModel):
    """Totals of a batch, and where the rest is. It stays small, however big the batch: rows are in the manifest.

    Attributes:
        name: the batch's name.
        flow_run_id: the run it belongs to.
        totals: counts by status, images, tokens, API calls, money, latencies.
        manifest_uri: JSON Lines, one row per request, in order.
        parquet_uri: the same as Parquet, where pyarrow is installed.
        gallery_uri: the page that shows the images; None where it could not be written.
        seconds: from start to end.
        notes: what else is to be known, such as by how much a budget was passed.
        rescued: how many answers wait on the batch's machine for the next run: paid for, and not taken by the store.
        rescue_folder: where these are; None where there are none.
        same_as: the earlier batch, by its id, whose manifest and gallery stand for this one's, because nothing has
            changed since; None of a batch that has its own.
        reference_uri: the small file that such a batch has in place of them.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    flow_run_id: str
    totals: Totals
    manifest_uri: str
    gallery_uri: str | None
    seconds: float
    parquet_uri: str | None = None
    notes: tuple[str, ...] = ()
    rescued: int = 0
    rescue_folder: str | None = None
    same_as: str | None = None
    reference_uri: str | None = None

    _store: ImageStore | None = PrivateAttr(None)

    def with_store(self, store: ImageStore) -> BatchReport:
        """Return this report, reading its rows through `store`: needed if the usual AWS chain can't read them."""
        copy = self.model_copy()
        copy._store = store
        return copy

    def __getstate__(self) -> dict[Any, Any]:
        # a store may hold a secret key, which has no place in a persisted result; rows that were read are a file
        state = super().__getstate__()
        fields = {name: value for name, value in state["__dict__"].items() if name != "rows"}
        return state | {"__dict__": fields, "__pydantic_private__": {"_store": None}}

    @cached_property
    def rows(self) -> Sequence[Row]:
        """One row per request, in the order given; the manifest is read once, when they are asked for.

        Raises:
            StoreError: the manifest can't be read.
        """
        store = self._store or ImageStore(url=(split_at(self.manifest_uri, BATCHES) or ("",))[0])
        with closing(self._lines(store)) as lines:
            return Rows(RowFile(lines))

    def _lines(self, store: ImageStore) -> Generator[bytes] | BinaryIO:
        if self.reference_uri is None:
            return store.open(self.manifest_uri)
        left = Unchanged.read(store, unchanged_in(store.objects.key(self.reference_uri)) or "")
        if left is None:
            raise StoreError(f"{self.reference_uri} is gone, or refers to no batch")
        return left.lines(store)

    @property
    def ok(self) -> bool:
        """Whether every row has its images, and its deliveries."""
        return not self.totals.failed and not self.totals.skipped

    @property
    def left_over(self) -> int:
        """How many requests the budget left over: skipped by design, for a later run."""
        return self.totals.errors.get(BudgetExceeded.__name__, 0)

    @property
    def facts(self) -> dict[str, Any]:
        """The batch in figures, JSON-able; no prompt is in it, and it does not grow with the batch."""
        others = {"flow_run_id", "parquet_uri", "notes", "reference_uri"}
        return self.model_dump(mode="json", exclude=others) | {"ok": self.ok}

    @property
    def latency(self) -> dict[str, dict[str, float]]:
        """By model, seconds that half, 90 % and 99 % of its answers took at most: `{"dall-e-2": {"p50": 3.1, ...}}`."""
        return {model: self.totals.latency(model) for model in sorted(self.totals.latencies)}

    @property
    def concurrency(self) -> float | None:
        """How many requests were answered side by side, on average; None where nothing was paid for."""
        return self.totals.concurrency

    @property
    def summary(self) -> str:
        """One line: `12 requests: 10 generated, 2 cached; 13 images, 10 API calls, 41,690 tokens, 0.40 USD, 3.1 s`."""
        totals = self.totals
        counts = {status: getattr(totals, status) for status in ("generated", "cached", "failed", "skipped")}
        shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "none"
        tokens = f", {totals.total_tokens:,} tokens" if totals.total_tokens else ""
        money = f", {totals.usd:,.2f} USD" if totals.usd is not None else ""
        images = counted(totals.images, "image") + _credentials(totals)
        costs = f"{images}, {counted(totals.api_calls, 'API call')}{tokens}{money}"
        line = f"{counted(totals.rows, 'request')}: {shown}; {costs}, {self.seconds:.1f} s"
        return f"{line}; {self.waiting}" if self.waiting else line

    @property
    def waiting(self) -> str | None:
        """Where answers wait that were paid for and that the store did not take, in words; None where none do."""
        if not self.rescued:
            return None
        return f"in the rescue folder {self.rescue_folder}, for the next run: {counted(self.rescued, 'paid answer')}"

    @property
    def unchanged(self) -> str | None:
        """That nothing has changed since an earlier batch, in words; None where something has."""
        return (
            f"Nothing has changed since the batch {self.same_as}, whose manifest and gallery stand."
            if self.same_as
            else None
        )

    def __str__(self) -> str:
        return self.summary

    def raise_for_failures(self) -> None:
        """Raise `BatchError` if a row failed, or was skipped for another reason than the budget.

        The message has counts by kind and some examples. What a budget left over is no failure.
        """
        if self.totals.failed + self.totals.skipped == self.left_over:
            return
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.totals.errors.items())
        failures = (
            row
            for row in self.rows
            if row.status in ("failed", "skipped") and row.error_type != BudgetExceeded.__name__
        )
        examples = [f"request {row.row}: {row.error}" for row in islice(failures, EXAMPLES)]
        raise BatchError("\n  ".join([f"{self.summary} ({kinds})", *examples]), report=self)
