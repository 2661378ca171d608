"""The command `costs`: what was paid for, by the ledger's records; and what was there already, by the manifests."""

from __future__ import annotations

import json
import operator
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from typing import Any, cast

from prefect_ttapi.capabilities import Model
from prefect_ttapi.cli.arguments import By, Counting
from prefect_ttapi.cli.batches import batches_of, rows_of
from prefect_ttapi.cli.reporting import Progress, complain, say, show_table, side_by_side
from prefect_ttapi.cli.stores import document_keys, passing_over_nonsense, prices_of, standing_store
from prefect_ttapi.generation.budget import Price
from prefect_ttapi.generation.limits import SURELY_UNPAID
from prefect_ttapi.ledger.documents import Cost, Document, Kept, Payment, documents_at
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.origins import SANDBOX_ORIGIN
from prefect_ttapi.results import Usage
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.store import ImageStore


@dataclass(frozen=True)
class Sum:
    """What was paid for under one heading.

    Attributes:
        images, calls, tokens, usd: of the answers that the ledger records, or recorded before they were paid for anew.
        saved: images that batches took from the store, in place of paying again.
        maybe_paid: sends that were perhaps paid for, and had no answer.
        in_vain: answers that were paid for and never used: they came second, or nobody can read them.
    """

    images: int = 0
    calls: int = 0
    tokens: int = 0
    usd: float = 0.0
    saved: int = 0
    maybe_paid: int = 0
    in_vain: int = 0

    def __add__(self, other: Sum) -> Sum:
        return Sum(*map(operator.add, astuple(self), astuple(other)))


def run(address: str, asked: Counting) -> int:
    """Show the costs; return 1 where a record could not be read, or more was paid than the limit."""
    prices, begin = prices_of(asked.price, asked.max_usd), since_of(asked.since)
    store, progress = standing_store(address, asked.endpoint_url), Progress(sys.stderr)
    sums: defaultdict[str, Sum] = defaultdict(Sum)
    left_out = unread = 0
    records = side_by_side(lambda key: _read(store, key), document_keys(store))
    for found in progress.count("reading the ledger", records):
        if found is None:
            unread += 1
        elif (found[0].api_origin == SANDBOX_ORIGIN) is not asked.sandbox:
            left_out += 1
        else:
            for heading, paid in _paid(*found, begin, asked.by, prices):
                sums[heading] += paid
    for heading, images in _saved(store, begin, asked.by, sandbox=asked.sandbox):
        sums[heading] += Sum(saved=images)
    progress.clear()
    _show(sums, asked.by, as_json=asked.json, money=bool(prices))
    if left_out and not asked.json:
        whose = "the API" if asked.sandbox else "the sandbox, which --sandbox counts"
        say(f"Left out: {counted(left_out, 'record')} of {whose}.")
    if unread:
        complain(f"{counted(unread, 'record')} can't be read: prefect-ttapi verify says why")
    usd = sum(each.usd for each in sums.values())
    too_much = asked.max_usd is not None and usd > asked.max_usd
    if too_much:
        complain(f"{usd:,.2f} USD were paid, which is more than --max-usd {asked.max_usd:,.2f}")
    return 1 if unread or too_much else 0


def since_of(text: str | None) -> datetime:
    """Return the beginning of a year, a month or a day, UTC.

    >>> since_of("2026-11").isoformat()
    '2026-11-01T00:00:00+00:00'

    Raises:
        ValueError: it is none of them.
    """
    if text is None:
        return datetime.min.replace(tzinfo=UTC)
    for form in ("%Y-%m-%d", "%Y-%m", "%Y"):
        with suppress(ValueError):
            return datetime.strptime(text, form).replace(tzinfo=UTC)
    raise ValueError(f"--since {text} is written like 2026, 2026-11 or 2026-11-05")


def _read(store: ImageStore, key: str) -> tuple[Document, tuple[Cost, ...]] | None:
    """Return a document of the ledger, and what its answers cost; None where it makes no sense."""
    with passing_over_nonsense():
        documents, request_hash = documents_at(store, key)
        if seen := documents.read(request_hash):
            return seen.document, seen.document.costs
    return None


def _paid(
    document: Document, answers: Sequence[Cost], begin: datetime, by: By, prices: Mapping[Model, Price]
) -> Iterator[tuple[str, Sum]]:
    """Yield what a request cost, each answer under its heading."""
    model, tokens = answers[-1].model if answers else "unknown", {answer.token for answer in answers}
    for each in answers:
        if each.created_at >= begin:
            usage, price = each.usage or Usage(), prices.get(cast(Model, each.model), Price())
            unsure = sum(outcome not in SURELY_UNPAID for outcome in each.earlier_outcomes)
            usd = price.of(each.images, each.usage)
            heading = _heading(by, each.model, each.created_at, each.flow_run_id or each.run_id)
            yield heading, Sum(each.images, each.api_calls, usage.total_tokens, usd, maybe_paid=unsure)
    others: list[Payment | Kept] = [*document.also_paid, *document.kept]
    in_vain = {note.token: note for note in others if note.token not in tokens}
    maybe = [note for note in document.maybe_paid if note.token not in tokens | in_vain.keys()]
    for notes, one in ((in_vain.values(), Sum(in_vain=1)), (maybe, Sum(maybe_paid=1))):
        for note in notes:
            if note.when >= begin:
                yield _heading(by, model, note.when, note.run_id), one


def _heading(by: By, model: str, when: datetime, run_id: str) -> str:
    return {"model": model, "day": f"{when.astimezone(UTC):%Y-%m-%d}", "batch": run_id}[by]


def _saved(store: ImageStore, begin: datetime, by: By, *, sandbox: bool) -> Iterator[tuple[str, int]]:
    """Yield headings with the images that batches since then took from the store."""
    for batch in batches_of(store):
        if batch.written < begin:
            continue
        run_id = layout.run_in(batch.folder) or ""
        images: Iterable[tuple[str | None, str, int]]
        if left := batch.unchanged:
            images = ((left.api_origin, *each) for each in left.totals.images_by_model.items())
        else:
            cached = (row for row in rows_of(store, batch) if row.status == "cached")
            images = ((row.api_origin, row.model, len(row.images)) for row in cached)
        for origin, model, count in images:
            if (origin == SANDBOX_ORIGIN) is sandbox:
                yield _heading(by, model, batch.written, run_id), count


def _show(sums: Mapping[str, Sum], by: By, *, as_json: bool, money: bool) -> None:
    lines: list[dict[str, Any]] = [{by: heading} | asdict(each) for heading, each in sorted(sums.items())]
    if as_json:
        for line in lines:
            print(json.dumps(line))
        return
    total = {by: "total"} | asdict(sum(sums.values(), Sum()))
    show_table([*lines, total], texts=1, money=money)
