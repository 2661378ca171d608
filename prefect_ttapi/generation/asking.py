"""Sending a claimed request: only with room for the answer and a claim that stands, up to the last moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from prefect_ttapi.errors import NotStoredError, Outcome, StoreError, TTAPIError
from prefect_ttapi.images.spool import check_room
from prefect_ttapi.ledger.claims import Claim, ClaimLostError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import CompletedImage, GeneratedImages, PartialImage
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.wire.client import TTAPIClient
from prefect_ttapi.wire.retries import Guard

logger = logging.getLogger(__name__)

#: After these nothing was paid, so that the claim can be given back and anyone may send again.
SURELY_UNPAID = frozenset({Outcome.NEVER_DELIVERED, Outcome.REJECTED, Outcome.REFUSED})

#: Bytes that must be free for each image before it is paid for: a large one, as the models make them.
IMAGE_ROOM: Final = 8 * 1024 * 1024


def perhaps_paid(error: Exception) -> bool:
    """Whether a request that ended in `error` may cost money all the same."""
    if isinstance(error, TTAPIError):
        return error.outcome not in SURELY_UNPAID
    return isinstance(error, NotStoredError) or not isinstance(error, StoreError)


def ask(
    claim: Claim,
    request: ImageRequest,
    client: TTAPIClient,
    store: ImageStore,
    before_send: Callable[[int], None] | None,
    while_waiting: Callable[[], None] | None,
    on_preview: Callable[[PartialImage], None] | None,
) -> GeneratedImages:
    """The answer to a claimed request; where there is none, the claim says what became of it.

    Raises:
        TTAPIError, StoreError, StopSending: there is no answer; what was surely not paid for is given back.
    """
    guard = _ClaimGuard(claim, store, request, before_send, while_waiting)
    try:
        if request.stream or on_preview is not None:
            return _read_stream(request, client.stream(request, guard), on_preview)
        return client.generate(request, guard)
    except TTAPIError as error:
        if perhaps_paid(error):
            claim.mark_unknown(str(error), error.outcome)
        else:
            claim.release()
        raise


class _CheckedStop(Stop):
    """A stop that `while_waiting` decides about."""

    def __init__(self, while_waiting: Callable[[], None] | None) -> None:
        super().__init__()
        self._while_waiting = while_waiting

    def check(self) -> None:
        if self._while_waiting is not None:
            self._while_waiting()


class _ClaimGuard(Guard):
    """Lets a claimed request be sent: with room for the answer, and while the claim stands."""

    def __init__(
        self,
        claim: Claim,
        store: ImageStore,
        request: ImageRequest,
        before_send: Callable[[int], None] | None,
        while_waiting: Callable[[], None] | None,
    ) -> None:
        super().__init__(_CheckedStop(while_waiting))
        self._claim = claim
        self._store = store
        self._images = request.n
        self._before_send = before_send
        self._sends = 0

    def admit(self, attempt: int) -> None:
        self._sends = attempt
        if self._before_send is not None:
            self._before_send(attempt)
        with _as_decision(attempt):
            _check_room(self._store, self._images)
            # last: each send, a repeated one too, needs a claim that is proven to stand
            self._claim.before_sending()

    def confirm(self) -> None:
        try:
            with _as_decision(self._sends):
                self._claim.before_writing()
        except StoreError:
            if self._sends == 1:
                self._claim.release()
            raise


@contextmanager
def _as_decision(number: int) -> Iterator[None]:
    """What stands in the way of a repeated send is no error of its own: what was sent before may be paid for."""
    try:
        yield
    except StoreError as error:
        if number == 1 or isinstance(error, ClaimLostError):
            raise
        raise StopSending(str(error)) from error


def _check_room(store: ImageStore, images: int) -> None:
    """StoreError: this machine has no room for the answer, which would be paid for and lost."""
    size = images * IMAGE_ROOM
    room = store.objects.room()
    if room is not None and room < size:
        raise StoreError(
            f"nothing is sent: the store's disk has {room:,} bytes free, and {size:,} may be needed"
        )
    try:
        check_room(size)
    except OSError as error:
        raise StoreError(f"nothing is sent: no temporary file can be written ({error.strerror})") from error


def _read_stream(
    request: ImageRequest,
    events: Iterable[PartialImage | CompletedImage],
    on_preview: Callable[[PartialImage], None] | None,
) -> GeneratedImages:
    """The completed images of a stream, as `generate` would give them."""
    started = time.monotonic()
    completed: list[CompletedImage] = []
    try:
        for event in events:
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
    return GeneratedImages(
        images=tuple(completed),
        usage=next((event.usage for event in reversed(completed) if event.usage), None),
        attempts=completed[0].attempts,
        seconds=time.monotonic() - started,
        request_id=completed[0].request_id,
        earlier_outcomes=completed[0].earlier_outcomes,
    )
