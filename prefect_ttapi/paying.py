"""One request, paid for once: the ledger says whether, the client sends, the store keeps, the ledger remembers.

This is the one place where wire and storage meet. It needs no Prefect run: tasks and batches call it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from prefect_ttapi.errors import NotStoredError, Outcome, StoreError, TTAPIError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import (
    CompletedImage,
    GeneratedImage,
    GeneratedImages,
    Generation,
    PartialImage,
)
from prefect_ttapi.storage.claims import Claim, ClaimLostError
from prefect_ttapi.storage.ledger import Ledger, Waiting
from prefect_ttapi.storage.records import Record
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.version import VERSION
from prefect_ttapi.wire.client import TTAPIClient

logger = logging.getLogger(__name__)

#: After these nothing was paid, so that the claim can be given back and anyone may send again.
SURELY_UNPAID = frozenset({Outcome.NEVER_DELIVERED, Outcome.REJECTED, Outcome.REFUSED})


def perhaps_paid(error: Exception) -> bool:
    """Whether a request that ended in `error` may cost money all the same."""
    if isinstance(error, TTAPIError):
        return error.outcome not in SURELY_UNPAID
    return isinstance(error, NotStoredError) or not isinstance(error, StoreError)


@dataclass(frozen=True)
class Payer:
    """Who pays, for the record: the Prefect runs, where there are any."""

    flow_run_id: str | None = None
    task_run_id: str | None = None


@dataclass(frozen=True)
class Paid:
    """A request's record, and whether this very call sent it (`sent`) or found it paid for.

    `fresh` are the images with their bytes still at hand; there are none where the record was found.
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
    on_preview: Callable[[PartialImage], None] | None = None,
) -> Paid:
    """The request's images: from the store where they are already paid for, else from the API.

    While somebody else is paying, their record is waited for.

    Args:
        not_before: records older than this don't count.
        known_absent: there was no record a moment ago: don't look before claiming.
        result_key: kept in a new record, for the cache of the caller.
        before_send: called with 1, 2, ... before each send. It may sleep: that the claim stands is proven after it.
            What it raises goes to the caller, and nothing is sent.
        on_preview: given each partial picture; the request is then read as a stream.

    Raises:
        TTAPIError: the API did not give the images; the ledger knows whether it may be asked again.
        StoreError: the store failed. Before sending: nothing was sent.
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
        on_preview=on_preview,
    )
    found = attempt()
    while isinstance(found, Waiting):
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
    on_preview: Callable[[PartialImage], None] | None = None,
    waiting: Waiting | None = None,
) -> Paid | Waiting:
    """As `pay_once`, but gives `Waiting` while somebody else is paying: hand it back after its `pause`."""
    while True:
        found = ledger.try_acquire(request.request_hash, not_before, waiting, known_absent=known_absent)
        if isinstance(found, Waiting):
            return found
        if isinstance(found, Record):
            return Paid(found, sent=False)
        try:
            return _pay(found, request, client, store, payer, result_key, before_send, on_preview)
        except ClaimLostError as lost:
            # held up for too long: whoever took the claim over may have the answer by now
            logger.warning("%s", lost)
            waiting, known_absent = None, False


def _pay(
    held: Claim,
    request: ImageRequest,
    client: TTAPIClient,
    store: ImageStore,
    payer: Payer,
    result_key: str | None,
    before_send: Callable[[int], None] | None,
    on_preview: Callable[[PartialImage], None] | None,
) -> Paid:
    """Send the request under a claim, store what comes, and settle the claim, whatever happens."""
    with held as claim:

        def before(number: int) -> None:
            if before_send is not None:
                before_send(number)
            # last: each send, a repeated one too, needs a claim that is proven to stand
            claim.before_sending()

        started = time.monotonic()
        try:
            streamed = request.stream or on_preview is not None
            ask = partial(_read_stream, client, on_preview=on_preview) if streamed else client.generate
            answer = ask(request, before_send=before)
        except TTAPIError as error:
            if perhaps_paid(error):
                claim.mark_unknown(str(error), error.outcome)
            else:
                claim.release()
            raise
        try:
            generation = _stored(request, answer, client.api_origin, store, payer, time.monotonic() - started)
            record = claim.record(generation, result_key=result_key)
        except StoreError as error:
            raise NotStoredError(f"paid for, but its images could not be stored: {error}") from error
        return Paid(record, sent=True, fresh=answer.images)


def _stored(
    request: ImageRequest,
    answer: GeneratedImages,
    api_origin: str,
    store: ImageStore,
    payer: Payer,
    seconds: float,
) -> Generation:
    """The answer's images, put into the store, and what is to be remembered of them."""
    # objects named by their content are shared: whose they are is the ledger's to say
    metadata = {"request-hash": request.request_hash, "model": request.model}
    return Generation(
        request=request,
        request_hash=request.request_hash,
        api_origin=api_origin,
        images=tuple(store.put_image(image, metadata) for image in answer.images),
        created_at=datetime.now(UTC),
        usage=answer.usage,
        api_calls=answer.attempts,
        seconds=round(seconds, 3),
        flow_run_id=payer.flow_run_id,
        task_run_id=payer.task_run_id,
        request_id=answer.request_id,
        earlier_outcomes=answer.earlier_outcomes,
        package_version=VERSION,
    )


def _read_stream(
    client: TTAPIClient,
    request: ImageRequest,
    *,
    before_send: Callable[[int], None],
    on_preview: Callable[[PartialImage], None] | None,
) -> GeneratedImages:
    """The completed images of a stream, as `generate` would give them."""
    sends: list[int] = []

    def counted(number: int) -> None:
        before_send(number)
        sends.append(number)

    completed: list[CompletedImage] = []
    try:
        for event in client.stream(request, before_send=counted):
            if isinstance(event, CompletedImage):
                completed.append(event)
            elif on_preview is not None:
                on_preview(event)
    except TTAPIError as error:
        if not completed:
            raise
        logger.warning(
            "%s: %d of %d images came: %s", request.request_hash[:12], len(completed), request.n, error
        )
    usage = next((event.usage for event in reversed(completed) if event.usage), None)
    images: tuple[GeneratedImage, ...] = tuple(completed)
    return GeneratedImages(images=images, usage=usage, attempts=len(sends))
