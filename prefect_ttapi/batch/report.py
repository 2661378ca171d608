"""Report what became of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr

from prefect_ttapi.errors import BatchError
from prefect_ttapi.lineage.manifest import Row, Rows
from prefect_ttapi.lineage.totals import Totals
from prefect_ttapi.storage.layout import BATCHES, split_at
from prefect_ttapi.storage.store import ImageStore

#: How many failures an error message quotes.
EXAMPLES = 3


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
        return Rows(lambda: store.open(self.manifest_uri))

    @property
    def ok(self) -> bool:
        """Whether every row has its images, and its deliveries."""
        return not self.totals.failed and not self.totals.skipped

    @property
    def facts(self) -> dict[str, Any]:
        """The batch in figures, JSON-able; no prompt is in it, and it does not grow with the batch."""
        named = self.model_dump(
            mode="json", include={"name", "manifest_uri", "gallery_uri", "seconds", "totals"}
        )
        return named | {"ok": self.ok}

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
        costs = f"{totals.images} images, {totals.api_calls} API calls{tokens}{money}, {self.seconds:.1f} s"
        return f"{totals.rows} requests: {shown}; {costs}"

    def raise_for_failures(self) -> None:
        """Raise `BatchError` if a row failed or was skipped, with counts by kind and some examples."""
        if self.ok:
            return
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.totals.errors.items())
        failures = (row for row in self.rows if row.status in ("failed", "skipped"))
        examples = [f"request {row.row}: {row.error}" for row in islice(failures, EXAMPLES)]
        raise BatchError("\n  ".join([f"{self.summary} ({kinds})", *examples]), report=self)
