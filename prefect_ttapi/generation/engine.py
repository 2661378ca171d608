"""One request, paid for once: the ledger says whether, the client sends, the store keeps, the ledger remembers.

Here, and in `asking`, wire and storage meet. No Prefect run is needed: tasks and batches call it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from prefect_ttapi.generation.asking import SURELY_UNPAID, ask
from prefect_ttapi.generation.persisting import Keeper
from prefect_ttapi.generation.rescue import Rescue
from prefect_ttapi.ledger.claims import ClaimLostError
from prefect_ttapi.ledger.documents import Record
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import (
    GeneratedImage,
    GeneratedImages,
    Generation,
    PartialImage,
)
from prefect_ttapi.stopping import StopSending
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.version import VERSION
from prefect_ttapi.wire.client import TTAPIClient


@dataclass(frozen=True)
class Payer:
    """Who pays, for the record: the Prefect runs, where there are any."""

    flow_run_id: str | None = None
    task_run_id: str | None = None


@dataclass(frozen=True)
class Paid:
    """A request's record, and whether this very call sent it (`sent`) or found it paid for.

    `fresh` are the record's images with their bytes still at hand; there are none where it was found in the store.
    """

    record: Record
    sent: bool
    fresh: tuple[GeneratedImage, ...] = ()

    @property
    def generation(self) -> Generation:
        return self.record.generation


def other_payments(paid: Paid) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What was paid for the request besides its images: perhaps, and surely but in vain. For people to read."""
    earlier = [outcome for outcome in paid.generation.earlier_outcomes if outcome not in SURELY_UNPAID]
    maybe = (
        *(f"an earlier send of the same call: {outcome}" for outcome in earlier),
        *(f"run {payment.run_id}: {payment.what}" for payment in paid.record.maybe_paid),
    )
    return maybe, tuple(f"run {payment.run_id}: {payment.what}" for payment in paid.record.also_paid)


def pay_once(
    request: ImageRequest,
    client: TTAPIClient,
    store: ImageStore,
    ledger: Ledger,
    *,
    payer: Payer = Payer(),
    not_before: datetime | None = None,
    known_absent: bool = False,
    result_key: str | None = None,
    before_send: Callable[[int], None] | None = None,
    while_waiting: Callable[[], None] | None = None,
    on_preview: Callable[[PartialImage], None] | None = None,
) -> Paid:
    """The request's images: from the store where they are already paid for, else from the API.

    While somebody else is paying, their record is waited for. What an earlier run paid for and could not store is
    taken from the store's rescue folder.

    Args:
        not_before: records older than this don't count.
        known_absent: there was no record a moment ago: don't look before claiming.
        result_key: kept in a new record, for the cache of the caller.
        before_send: called with 1, 2, ... before each send. It may sleep: that the claim stands is proven after it.
            What it raises goes to the caller, and nothing is sent.
        while_waiting: called again and again while the request waits for its turn to be sent, or for somebody
            else's record; what it raises ends that.
        on_preview: given each partial picture; the request is then read as a stream.

    Raises:
        TTAPIError: the API did not give the images; the ledger knows whether it may be asked again.
        NotStoredError: paid for, but the store did not take it; the next run takes it from the rescue folder.
        StoreError: the store failed before anything was sent.
    """
    attempt = partial(
        try_pay_once,
        request,
        client,
        store,
        ledger,
        payer=payer,
        not_before=not_before,
        known_absent=known_absent,
        result_key=result_key,
        before_send=before_send,
        while_waiting=while_waiting,
        on_preview=on_preview,
    )
    found = attempt()
    while isinstance(found, Waiting):
        if while_waiting is not None:
            while_waiting()
        time.sleep(found.pause)
        found = attempt(waiting=found)
    return found


def try_pay_once(
    request: ImageRequest,
    client: TTAPIClient,
    store: ImageStore,
    ledger: Ledger,
    *,
    payer: Payer = Payer(),
    not_before: datetime | None = None,
    known_absent: bool = False,
    result_key: str | None = None,
    before_send: Callable[[int], None] | None = None,
    while_waiting: Callable[[], None] | None = None,
    on_preview: Callable[[PartialImage], None] | None = None,
    on_answer: Callable[[GeneratedImages], None] | None = None,
    waiting: Waiting | None = None,
) -> Paid | Waiting:
    """As `pay_once`, but gives `Waiting` while somebody else is paying: hand it back after its `pause`.

    Args:
        on_answer: given the API's answer before it is stored.
    """
    request_hash = request.request_hash
    keeper = Keeper(store, Rescue(store, ledger.api_origin, ledger.log), ledger.log)
    has_answer = keeper.rescue.holds(request_hash)
    while True:
        found = ledger.try_acquire(
            request_hash, not_before, waiting, known_absent=known_absent, has_answer=has_answer
        )
        if isinstance(found, Waiting):
            return found
        if isinstance(found, Record):
            if has_answer:
                keeper.forget(found)
            return Paid(found, sent=False)
        try:
            with found as claim:
                if not has_answer:
                    answer = ask(claim, request, client, store, before_send, while_waiting, on_preview)
                    if on_answer is not None:
                        on_answer(answer)
                    generation = _generation(request, answer, store, client.api_origin, payer)
                    record = keeper.keep(
                        claim,
                        claim.answer(generation, result_key),
                        answer.images,
                        request.model,
                        is_ending=partial(_is_ending, while_waiting),
                    )
                    is_own = record.generation.images == generation.images
                    return Paid(record, sent=True, fresh=answer.images if is_own else ())
                if (taken := keeper.take_back(claim, result_key)) is not None:
                    return Paid(taken[0], sent=False, fresh=taken[1])
        except ClaimLostError as lost:
            # held up for too long: whoever took the claim over may have the answer by now
            ledger.log.warning("%s", lost)
        waiting, known_absent, has_answer = None, False, False


def _is_ending(while_waiting: Callable[[], None] | None) -> bool:
    """Whether the caller wants nothing sent any more: perhaps it is being interrupted, and has little time."""
    try:
        if while_waiting is not None:
            while_waiting()
    except StopSending:
        return True
    return False


def _generation(
    request: ImageRequest, answer: GeneratedImages, store: ImageStore, api_origin: str, payer: Payer
) -> Generation:
    """What is to be remembered of an answer, whose images are yet to be stored."""
    return Generation(
        request=request,
        request_hash=request.request_hash,
        api_origin=api_origin,
        images=tuple(map(store.reference, answer.images)),
        created_at=datetime.now(UTC),
        usage=answer.usage,
        api_calls=answer.attempts,
        seconds=round(answer.seconds, 3),
        flow_run_id=payer.flow_run_id,
        task_run_id=payer.task_run_id,
        request_id=answer.request_id,
        earlier_outcomes=answer.earlier_outcomes,
        package_version=VERSION,
    )
