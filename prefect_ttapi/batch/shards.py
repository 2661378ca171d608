"""The unit of work of a batch: one task run that carries one or more requests, each of which ends as a row.

A Prefect server takes about 20 task runs a second, so that a big batch puts many requests into one. Nothing that
happens to a request fails the task run: it is in the request's row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from prefect_ttapi.batch.breaker import Breaker
from prefect_ttapi.batch.items import Done, Item, row_of, skipped
from prefect_ttapi.batch.notes import NotedStop
from prefect_ttapi.batch.session import OnAnswer, Session, session_for
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import (
    BudgetExceeded,
    InsufficientBalanceError,
    KeyTemplateError,
    PictureError,
    StoreError,
    TTAPIError,
)
from prefect_ttapi.generation.asking import perhaps_paid
from prefect_ttapi.generation.budget import Budget, Spending
from prefect_ttapi.generation.clients import shared_client
from prefect_ttapi.generation.context import named, payer_of
from prefect_ttapi.generation.delivery import deliver
from prefect_ttapi.generation.engine import Paid, Payer, other_payments, try_pay_once
from prefect_ttapi.generation.ledgers import ledger_for
from prefect_ttapi.images.renditions import Version
from prefect_ttapi.images.thumbnails import GALLERY_BOX, thumbnail_or_none
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.lineage.events import balance_exhausted, images_delivered
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.withheld import Shown
from prefect_ttapi.responses import GeneratedImage, Generation, StoredImage
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.wire.client import TTAPIClient
from prefect_ttapi.wire.limiter import RateLimit
from prefect_ttapi.wire.redaction import withholding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What all shards of one batch share; it travels to wherever the task runner runs them.

    Attributes:
        run_id: what counts as one run where it is about paying; of no concern to manifests and people.
        in_flight, rate_limit: the share of a shard that runs in a process of its own.
    """

    batch_id: str
    run_id: str
    name: str
    date: datetime
    key: str = DEFAULT_KEY
    deliver_to: ImageStore | None = None
    not_before: datetime | None = None
    in_flight: int = 1
    rate_limit: float | None = None
    breaker: int | None = None
    thumbnails: bool = True
    versions: tuple[Version, ...] = (None,)
    overwrite: bool = False
    record_prompts: bool = True


def _shard_name(parameters: dict[str, Any]) -> str:
    """`generate-gpt-image-2-3f9a12`, or `generate-34-requests-from-68`."""
    items: Sequence[Item] = parameters["items"]
    first = items[0]
    if len(items) == 1:
        return f"generate-{first.request.model}-{first.request.request_hash[:6]}"
    return f"generate-{len(items)}-requests-from-{first.row}"


@task(name="generate-shard", task_run_name=named(_shard_name), cache_policy=NO_CACHE, persist_result=False)
def generate_shard(
    items: Sequence[Item], credentials: TTAPICredentials, store: ImageStore, plan: Plan, share: Budget
) -> list[Done | None]:
    """Generate and deliver each item; one result per item, in order, None where it was handed on already.

    Args:
        share: what a shard in a process of its own may spend.
    """
    task_ctx = TaskRunContext.get()
    ledger = ledger_for(credentials, store, plan.run_id, get_run_logger())
    with session_for(plan.batch_id, partial(_own_session, plan, store, share)) as session:
        work = partial(_outcome, shared_client(credentials), store, ledger, plan, session, payer_of(task_ctx))
        return session.run(items, work)


def _own_session(plan: Plan, store: ImageStore, share: Budget) -> Session:
    return Session(
        plan.in_flight,
        Spending(share),
        breaker=Breaker(plan.breaker),
        # whoever had this share before may just have sent
        rate=RateLimit(plan.rate_limit, at_once=False) if plan.rate_limit else None,
        stop=NotedStop(store, plan.batch_id),
    )


def _outcome(
    client: TTAPIClient,
    store: ImageStore,
    ledger: Ledger,
    plan: Plan,
    session: Session,
    payer: Payer,
    item: Item,
    waiting: Waiting | None,
    on_answer: OnAnswer,
) -> Done | Waiting:
    """One item, to its row, or to the claim of somebody else that it waits for."""
    stop = session.stop
    if stop.reason:
        return skipped(item, ledger.api_origin, stop.reason, stop.error_type)
    try:
        denial = session.spending.denial(0) if item.may_pay else "the budget is used up"
        with withholding(Shown(plan.record_prompts).withheld(item.request)):
            paid = (
                _found(ledger, item, plan, denial)
                if denial
                else try_pay_once(
                    item.request,
                    client,
                    store,
                    ledger,
                    payer=payer,
                    not_before=plan.not_before,
                    known_absent=item.known_absent,
                    before_send=partial(_go_ahead, session),
                    while_waiting=partial(_go_on, session),
                    on_answer=on_answer,
                    waiting=waiting,
                )
            )
    except (BudgetExceeded, StopSending) as error:
        kind = "BudgetExceeded" if isinstance(error, BudgetExceeded) else stop.error_type
        return skipped(item, ledger.api_origin, str(error), kind)
    except Exception as error:
        asked = row_of(item, ledger.api_origin)
        if isinstance(error, InsufficientBalanceError):
            balance_exhausted(ledger.api_origin, str(error))
        elif not isinstance(error, TTAPIError | StoreError):
            logger.exception("Request %s failed in a way that is not foreseen", asked.request_hash)
        return Done(_failed(asked, error), images_paid=item.request.n if _may_cost(error) else 0)
    if isinstance(paid, Waiting):
        return paid
    row = row_of_paid(item, paid)
    return Done(
        _delivered(row, paid.generation, item, store, plan, payer.flow_run_id),
        thumbnails=thumbnails_of(store, row.images, paid.fresh) if plan.thumbnails else (),
        images_paid=len(paid.generation.images) if paid.sent else 0,
    )


def _may_cost(error: Exception) -> bool:
    refused_by_the_ledger = isinstance(error, TTAPIError) and not error.attempts
    return perhaps_paid(error) and not refused_by_the_ledger


class _Unwanted(Stop):
    """Ends a request's wait for its turn once the batch stops, or others have spent the rest of the budget."""

    def __init__(self, session: Session, attempt: int) -> None:
        super().__init__()
        self._session = session
        self._attempt = attempt

    def check(self) -> None:
        _go_on(self._session)
        denial = self._session.spending.denial(0)
        if denial:
            raise BudgetExceeded(denial) if self._attempt == 1 else StopSending(denial)


def _go_ahead(session: Session, attempt: int) -> None:
    """Right before a send: wait for its turn, and see that the batch still wants it."""
    unwanted = _Unwanted(session, attempt)
    if session.rate is not None:
        session.rate.wait(unwanted)
    unwanted.check()


def _go_on(session: Session) -> None:
    if session.stop.reason:
        raise StopSending(session.stop.reason)


def row_of_paid(item: Item, paid: Paid) -> Row:
    """The row of a request whose images are in the store."""
    maybe_paid, also_paid = other_payments(paid)
    return Row.of(
        item.row,
        paid.generation,
        "generated" if paid.sent else "cached",
        maybe_paid=maybe_paid,
        also_paid=also_paid,
        values=item.values,
        ledger_tag=paid.record.tag,
        ledger_size=paid.record.size,
    )


def _delivered(
    row: Row, made: Generation, item: Item, store: ImageStore, plan: Plan, run_id: str | None
) -> Row:
    """The row with its copies, or failed with its images where they could not be delivered."""
    if plan.deliver_to is None:
        return row
    shown = Shown(plan.record_prompts)
    try:
        copies = deliver(
            made,
            plan.deliver_to,
            plan.key,
            prompt=shown.prompt(made.request),
            values=item.values,
            source=store,
            date=plan.date,
            batch=plan.name,
            versions=plan.versions,
            overwrite=plan.overwrite,
            run_id=run_id,
        )
    except Exception as error:
        if not isinstance(error, StoreError | KeyTemplateError | PictureError):
            logger.exception("Delivering %s failed in a way that is not foreseen", row.request_hash)
        return _failed(row, error)
    images_delivered(made, copies, shown)
    return row.model_copy(update={"delivered": tuple(copies)})


def _found(ledger: Ledger, item: Item, plan: Plan, denial: str) -> Paid:
    record = ledger.look_up(item.request.request_hash, plan.not_before)
    if record is None:
        raise BudgetExceeded(denial)
    return Paid(record, sent=False)


def _failed(row: Row, error: Exception) -> Row:
    calls = {"api_calls": error.attempts, "seconds": error.elapsed} if isinstance(error, TTAPIError) else {}
    paid = {"maybe_paid": (*row.maybe_paid, str(error))} if not row.images and perhaps_paid(error) else {}
    failure = {"status": "failed", "error": str(error), "error_type": type(error).__name__}
    return row.model_copy(update=failure | calls | paid)


def thumbnails_of(
    store: ImageStore, images: Sequence[StoredImage], fresh: Sequence[GeneratedImage] = ()
) -> tuple[bytes | None, ...]:
    """One for each image, from the bytes at hand or else from the store."""
    openers = [image.open for image in fresh] or [partial(store.open, image.uri) for image in images]
    return tuple(thumbnail_or_none(opener, GALLERY_BOX) for opener in openers)
