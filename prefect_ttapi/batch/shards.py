"""The unit of a batch: one task run that carries one or more requests, each of which ends as a row.

A Prefect server takes about 20 task runs a second, so that a big batch puts many requests into one. Nothing that
happens to a request fails the task run: it is in the request's row.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from prefect_ttapi.clients import shared_client
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.delivery import deliver
from prefect_ttapi.errors import ACCOUNT_ERRORS, BudgetExceeded, StoreError, TTAPIError
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.thumbnails import GALLERY_BOX, thumbnail_or_none
from prefect_ttapi.paying import SURELY_UNPAID, Paid, Payer, pay_once, perhaps_paid
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import Generation
from prefect_ttapi.runs import named, payer_of, run_id
from prefect_ttapi.storage.keys import KeyTemplateError
from prefect_ttapi.storage.ledger import Ledger
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.wire.client import TTAPIClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """A legal request at its place in the batch, with the values of its key template."""

    row: int
    request: ImageRequest
    values: dict[str, Any] = field(default_factory=dict)
    with_thumbnails: bool = False
    may_pay: bool = True  # False: the budget is used up, only a record will do


@dataclass(frozen=True)
class Plan:
    """What all shards of one batch share; it travels to wherever the task runner runs them."""

    batch_id: str
    name: str
    date: datetime
    key: str
    deliver_to: ImageStore | None
    not_before: datetime | None
    in_flight: int


@dataclass(frozen=True)
class Done:
    """A request's row, its thumbnails (WebP), and how many images it may have cost."""

    row: Row
    thumbnails: tuple[bytes | None, ...] = ()
    images_paid: int = 0


class Stop:
    """Why the rest of a batch is not sent, once there is a reason; set and read by threads of one process."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.error_type: str | None = None
        self.cancelled = False

    def cancel(self, why: str = "the batch was cancelled", error_type: str = "CancelledError") -> None:
        """Whoever waits for the batch does so no longer: stop sending, and reading what has no known end."""
        self.because(why, error_type)
        self.cancelled = True

    def because(self, why: str, error_type: str) -> None:
        """Stop sending; the first reason stays."""
        if self.reason is None:
            self.reason, self.error_type = f"not sent, because {why}", error_type


_STOPS: dict[str, Stop] = {}
_STOPS_LOCK = threading.Lock()


@contextmanager
def stop_of(batch_id: str) -> Iterator[Stop]:
    """The batch's `Stop`, shared by all who enter in this process."""
    with _STOPS_LOCK:
        mine = batch_id not in _STOPS
        stop = _STOPS.setdefault(batch_id, Stop())
    try:
        yield stop
    finally:
        if mine:
            with _STOPS_LOCK:
                del _STOPS[batch_id]


def row_of(item: Item, api_origin: str | None) -> Row:
    """The item's row as long as nothing has become of it: skipped."""
    return Row(
        row=item.row,
        status="skipped",
        request=item.request,
        request_hash=item.request.request_hash,
        api_origin=api_origin,
        values=item.values,
    )


def _shard_name(parameters: dict[str, Any]) -> str:
    """`generate-gpt-image-2-3f9a12`, or `generate-34-requests-from-68`."""
    items: Sequence[Item] = parameters["items"]
    first = items[0]
    if len(items) == 1:
        return f"generate-{first.request.model}-{first.request.request_hash[:6]}"
    return f"generate-{len(items)}-requests-from-{first.row}"


@task(name="generate-shard", task_run_name=named(_shard_name), cache_policy=NO_CACHE, persist_result=False)
def generate_shard(
    items: Sequence[Item], credentials: TTAPICredentials, store: ImageStore, plan: Plan
) -> list[Done]:
    """Generate and deliver each item, `plan.in_flight` at a time; one result per item, in order."""
    task_ctx = TaskRunContext.get()
    ledger = Ledger(
        store,
        credentials.api_origin,
        run_id=run_id(task_ctx),
        retry_unknown_outcome=credentials.retry_unknown_outcome,
        log=get_run_logger(),
    )
    with stop_of(plan.batch_id) as stop:
        work = partial(_run, shared_client(credentials), store, ledger, plan, stop, payer_of(task_ctx))
        if len(items) == 1:
            return [work(items[0])]
        with ThreadPoolExecutor(plan.in_flight, thread_name_prefix="ttapi-shard") as threads:
            return list(threads.map(work, items))


def _run(
    client: TTAPIClient, store: ImageStore, ledger: Ledger, plan: Plan, stop: Stop, payer: Payer, item: Item
) -> Done:
    """One item, to its row."""
    asked = row_of(item, ledger.api_origin)
    if stop.reason:
        return Done(asked.model_copy(update={"error": stop.reason, "error_type": stop.error_type}))
    try:
        paid = (
            pay_once(item.request, client, store, ledger, payer=payer, not_before=plan.not_before)
            if item.may_pay
            else _found(ledger, item, plan)
        )
    except BudgetExceeded as error:
        return Done(asked.model_copy(update={"error": str(error), "error_type": "BudgetExceeded"}))
    except Exception as error:
        if isinstance(error, ACCOUNT_ERRORS):
            stop.because(f"an earlier request failed: {error}", type(error).__name__)
        if not isinstance(error, TTAPIError | StoreError):
            logger.exception("Request %s failed in a way that is not foreseen", asked.request_hash)
        images = item.request.n if perhaps_paid(error) else 0
        return Done(_failed(asked, error), images_paid=images)
    row = Row.of(
        item.row,
        paid.generation,
        "generated" if paid.sent else "cached",
        maybe_paid=_other_payments(paid),
        values=item.values,
    )
    return Done(
        _delivered(row, paid.generation, item, store, plan),
        thumbnails=_thumbnails(store, paid) if item.with_thumbnails else (),
        images_paid=len(paid.generation.images) if paid.sent else 0,
    )


def _delivered(row: Row, made: Generation, item: Item, store: ImageStore, plan: Plan) -> Row:
    """The row with its copies, or failed with its images where they could not be delivered."""
    if plan.deliver_to is None:
        return row
    try:
        copies = deliver(
            made,
            plan.deliver_to,
            plan.key,
            values=item.values,
            source=store,
            date=plan.date,
            batch=plan.name,
        )
    except Exception as error:
        if not isinstance(error, StoreError | KeyTemplateError):
            logger.exception("Delivering %s failed in a way that is not foreseen", row.request_hash)
        return _failed(row, error)
    return row.model_copy(update={"delivered": tuple(copies)})


def _found(ledger: Ledger, item: Item, plan: Plan) -> Paid:
    record = ledger.look_up(item.request.request_hash, plan.not_before)
    if record is None:
        raise BudgetExceeded("the budget is used up, and its images are no longer in the store")
    return Paid(record, sent=False)


def _failed(row: Row, error: Exception) -> Row:
    calls = {"api_calls": error.attempts, "seconds": error.elapsed} if isinstance(error, TTAPIError) else {}
    paid = {"maybe_paid": (*row.maybe_paid, str(error))} if not row.images and perhaps_paid(error) else {}
    failure = {"status": "failed", "error": str(error), "error_type": type(error).__name__}
    return row.model_copy(update=failure | calls | paid)


def _other_payments(paid: Paid) -> tuple[str, ...]:
    """What else may have been paid for this request, besides its images."""
    earlier = [outcome for outcome in paid.generation.earlier_outcomes if outcome not in SURELY_UNPAID]
    return (
        *(f"an earlier send of the same call: {outcome}" for outcome in earlier),
        *(f"run {payment.run_id}: {payment.what}" for payment in paid.record.maybe_paid),
        *(
            f"run {payment.run_id}, its answer was not used: {payment.what}"
            for payment in paid.record.also_paid
        ),
    )


def _thumbnails(store: ImageStore, paid: Paid) -> tuple[bytes | None, ...]:
    """One for each image, from the bytes at hand or else from the store."""
    openers = [image.open for image in paid.fresh] or [
        partial(store.open, i.uri) for i in paid.generation.images
    ]
    return tuple(thumbnail_or_none(opener, GALLERY_BOX) for opener in openers)
