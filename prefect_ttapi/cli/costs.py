"""The command `costs`: what was paid for, by the ledger's records; and what was there already, by the manifests."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from prefect_ttapi.capabilities import Model
from prefect_ttapi.cli.batches import batches_of, rows_of
from prefect_ttapi.cli.reporting import Progress, complain, say, show_table, side_by_side
from prefect_ttapi.cli.stores import prices_of, standing_store
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.budget import Price
from prefect_ttapi.ledger.documents import Document, Record, documents_at
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
        images, calls, tokens, usd: of the answers that the ledger records.
        saved: images that batches took from the store, in place of paying again.
        maybe_paid: requests that were sent, and perhaps paid for, without an answer.
        in_vain: answers that were paid for and are not used: they came second, or nobody can read them.
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
    *,
    sandbox: bool,
    as_json: bool,
) -> int:
    """Show the costs; return 1 where a record could not be read."""
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
    return 1 if unread else 0


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


def _read(store: ImageStore, key: str) -> tuple[Document, Record | None] | None:
    """Return a document of the ledger and what it records; None where it makes no sense."""
    try:
        documents, request_hash = documents_at(store, key)
        seen = documents.read(request_hash)
        return (seen.document, documents.record(seen)) if seen else None
    except NoAnswerError:
        raise
    except (StoreError, ValueError):
        return None


def _paid(
    document: Document, record: Record | None, begin: datetime, by: By, prices: Mapping[Model, Price]
) -> Iterator[tuple[str, Sum]]:
    model = record.generation.request.model if record else "unknown"
    if record and record.generation.created_at >= begin:
        made = record.generation
        usage, price = made.usage or Usage(), prices.get(made.request.model, Price())
        usd = price.of(len(made.images), made.usage)
        heading = _heading(by, model, made.created_at, made.flow_run_id or record.run_id)
        yield heading, Sum(len(made.images), made.api_calls, usage.total_tokens, usd)
    in_vain = [(each.token, each.when, each.run_id) for each in document.also_paid]
    in_vain += [
        (each.token, each.when, each.run_id) for each in document.kept if each != (record and record.rest)
    ]
    tokens = {token for token, _, _ in in_vain}
    maybe = [(each.when, each.run_id) for each in document.maybe_paid if each.token not in tokens]
    yield from ((_heading(by, model, when, run), Sum(maybe_paid=1)) for when, run in maybe if when >= begin)
    yield from ((_heading(by, model, when, run), Sum(in_vain=1)) for _, when, run in in_vain if when >= begin)


def _heading(by: By, model: str, when: datetime, run_id: str) -> str:
    return {"model": model, "day": f"{when.astimezone(UTC):%Y-%m-%d}", "batch": run_id}[by]


def _saved(store: ImageStore, begin: datetime, by: By, *, sandbox: bool) -> Iterator[tuple[str, int]]:
    """Yield headings with the images that batches since then took from the store."""
    for batch in batches_of(store):
        if batch.written < begin:
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
