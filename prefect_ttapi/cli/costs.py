"""The command `costs`: what was paid for, by the ledger's records; and what was there already, by the manifests."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal, cast

from prefect_ttapi.capabilities import Model
from prefect_ttapi.cli.batches import batches_of, rows_of
from prefect_ttapi.cli.reporting import Progress, complain, say, show_table, side_by_side
from prefect_ttapi.cli.stores import prices_of, standing_store
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.budget import Price
from prefect_ttapi.generation.limits import SURELY_UNPAID
from prefect_ttapi.ledger.documents import Cost, Document, Kept, Payment, documents_at
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.origins import SANDBOX_ORIGIN
from prefect_ttapi.results import Usage
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.objects import NoAnswerError
from prefect_ttapi.storage.store import ImageStore

By = Literal["model", "day", "batch"]


@dataclass
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

    def __iadd__(self, other: Sum) -> Sum:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


def run(
    address: str,
    endpoint_url: str | None,
    since: str | None,
    by: By,
    prices: Sequence[str],
    most: float | None,
    *,
    sandbox: bool,
    as_json: bool,
) -> int:
    """Show the costs; return 1 where a record could not be read, or more than `most` USD were paid."""
    if most is not None and not prices:
        raise ValueError("--max-usd needs a price for each model, as --price gpt-image-2=0.04")
    store, known, begin, progress = (
        standing_store(address, endpoint_url),
        prices_of(prices),
        since_of(since),
        Progress(sys.stderr),
    )
    sums: defaultdict[str, Sum] = defaultdict(Sum)
    left_out = unread = 0
    for found in progress.count(
        "reading the ledger", side_by_side(lambda key: _read(store, key), _keys(store))
    ):
        if found is None:
            unread += 1
        elif (found[0].api_origin == SANDBOX_ORIGIN) is not sandbox:
            left_out += 1
        else:
            for heading, paid in _paid(*found, begin, by, known):
                sums[heading] += paid
    for heading, images in _saved(store, begin, by, sandbox=sandbox):
        sums[heading].saved += images
    progress.clear()
    _show(sums, by, as_json=as_json, with_money=bool(known))
    if left_out and not as_json:
        whose = "the API" if sandbox else "the sandbox, which --sandbox counts"
        say(f"Left out: {counted(left_out, 'record')} of {whose}.")
    if unread:
        complain(f"{counted(unread, 'record')} can't be read: prefect-ttapi verify says why")
    usd = sum(each.usd for each in sums.values())
    if too_much := most is not None and usd > most:
        complain(f"{usd:,.2f} USD were paid, which is more than --max-usd {most:,.2f}")
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
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
    raise ValueError(f"--since {text} is written like 2026, 2026-11 or 2026-11-05")


def _keys(store: ImageStore) -> Iterator[str]:
    return (listed.key for listed in store.list(layout.LEDGER) if layout.document_in(listed.key))


def _read(store: ImageStore, key: str) -> tuple[Document, tuple[Cost, ...]] | None:
    """Return a document of the ledger, and what its answers cost; None where it makes no sense."""
    try:
        documents, request_hash = documents_at(store, key)
        seen = documents.read(request_hash)
        costs = seen.document.costs if seen else ()
    except NoAnswerError:
        raise
    except (StoreError, ValueError):
        return None
    return (seen.document, costs) if seen else None


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
    told = [
        *((note, Sum(in_vain=1)) for note in in_vain.values()),
        *((note, Sum(maybe_paid=1)) for note in maybe),
    ]
    yield from (
        (_heading(by, model, note.when, note.run_id), one) for note, one in told if note.when >= begin
    )


def _heading(by: By, model: str, when: datetime, run_id: str) -> str:
    return {"model": model, "day": f"{when.astimezone(UTC):%Y-%m-%d}", "batch": run_id}[by]


def _saved(store: ImageStore, begin: datetime, by: By, *, sandbox: bool) -> Iterator[tuple[str, int]]:
    """Yield headings with the images that batches since then took from the store."""
    for batch in batches_of(store):
        if batch.written < begin:
            continue
        if left := batch.unchanged:
            if (left.api_origin == SANDBOX_ORIGIN) is sandbox:
                run_id = layout.run_in(batch.folder) or ""
                for model, images in left.totals.images_by_model.items():
                    yield _heading(by, model, batch.written, run_id), images
            continue
        for row in rows_of(store, batch):
            if row.status == "cached" and (row.api_origin == SANDBOX_ORIGIN) is sandbox:
                yield (
                    _heading(by, row.model, batch.written, layout.run_in(batch.folder) or ""),
                    len(row.images),
                )


def _show(sums: Mapping[str, Sum], by: By, *, as_json: bool, with_money: bool) -> None:
    ordered, total = sorted(sums.items()), Sum()
    for heading, each in ordered:
        total += each
        if as_json:
            print(json.dumps({by: heading, **asdict(each)}))
    if as_json:
        return
    names = [name for name in asdict(total) if with_money or name != "usd"]
    heads = [name.replace("_", " ") for name in names]
    rows = (
        [heading, *(_cell(getattr(each, name)) for name in names)]
        for heading, each in [*ordered, ("total", total)]
    )
    show_table([by, *heads], rows, right=heads)


def _cell(value: float) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
