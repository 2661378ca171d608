"""One request, paid once: the ledger says whether it is, the client sends, the store keeps, the ledger remembers.

    generate ─► try_generate: ledger ─► a record: found, nothing is sent
                                     ─► somebody else's claim: wait
                                     ─► a claim of our own ─► an answer in the rescue folder: stored and recorded
                                                           ─► one that nobody could read yet: read again
                                                           ─► guard, client ─► images stored, then recorded

Here the API, the store and the ledger meet. No Prefect run is needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.retries import Guard
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import DownloadError, InvalidResponseError, NotStoredError, StoreError, TTAPIError
from prefect_ttapi.generation.limits import Limits, Place, check_room_for, perhaps_paid
from prefect_ttapi.generation.persisting import Keeper, Paid
from prefect_ttapi.generation.rescue import Read, Unread
from prefect_ttapi.generation.runs import RunContext
from prefect_ttapi.ledger.claims import Claim, ClaimLostError
from prefect_ttapi.ledger.documents import (
    Answer,
    Kept,
    Log,
    Record,
    facts_of_generation,
    generation_of,
    line_of,
)
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import (
    VERSION,
    CompletedImage,
    GeneratedImages,
    Generation,
    PartialImage,
    RawAnswer,
)
from prefect_ttapi.stopping import StopSending
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Given each partial picture of a request that is read as a stream.
OnPreview = Callable[[PartialImage], None]

#: Called where a request is about to be sent; what it raises ends the request, unsent.
BeforeSending = Callable[[], None]


def ledger_for(credentials: TTAPICredentials, store: ImageStore, run_id: str, log: Log = logger) -> Ledger:
    """Return the ledger of the API's answers in the store, as a run's credentials and store want it."""
    return Ledger(
        store,
        credentials.api_origin,
        run_id,
        ttl=store.claim_ttl,
        on_dead_claim=credentials.on_dead_claim,
        retry_unknown_outcome=credentials.retry_unknown_outcome,
        log=log,
    )


@dataclass(frozen=True)
class Engine:
    """What one run needs to have its requests paid for once: made once, used from all its threads.

    Attributes:
        client: sends.
        store: keeps the images.
        ledger: says who may send, and remembers the answers; it knows the run that pays.
        run: named in the records.
        limits: asked before each send.
        not_before: records older than this don't count; None: all count.
        result_key: kept in new records, for the cache of the caller.
        on_preview: given each partial picture; requests are then read as streams.
    """

    client: TTAPIClient
    store: ImageStore
    ledger: Ledger
    run: RunContext
    limits: Limits = field(default_factory=Limits)
    not_before: datetime | None = None
    result_key: str | None = None
    on_preview: OnPreview | None = None

    @cached_property
    def keeper(self) -> Keeper:
        """What stores and records the answers."""
        return Keeper(self.store, self.ledger.api_origin, self.ledger.log)

    def generate(self, request: ImageRequest) -> Paid:
        """Return the request's images: from the store where they are already paid for, else from the API.

        While somebody else is paying, their record is waited for. What an earlier run paid for and could not store
        is taken from the store's rescue folder; what it paid for and could not read is read again.

        Raises:
            StopSending, BudgetExceeded: nothing was sent.
            TTAPIError: the API did not give the images; the ledger knows whether it may be asked again. With no
                `attempts` it is about an earlier answer that is kept, and still can't be read.
            NotStoredError: paid for, but the store did not take it; the next run takes it from the rescue folder.
            StoreError: the store failed before anything was sent.
        """
        found = self.try_generate(request)
        while isinstance(found, Waiting):
            self.limits.stop.wait(found.pause)
            self.limits.stop.check()
            found = self.try_generate(request, found)
        return found

    def try_generate(
        self,
        request: ImageRequest,
        waiting: Waiting | None = None,
        *,
        known_absent: bool = False,
        before_sending: BeforeSending | None = None,
    ) -> Paid | Waiting:
        """Do as `generate`, but return `Waiting` while somebody else is paying: hand it back after its `pause`.

        Args:
            known_absent: there was no record a moment ago: don't look before claiming.
            before_sending: called where nothing is known of the request, so that it is to be paid for.
        """
        rescue = self.keeper.rescue
        with self.limits.place(request) as place:
            has_answer = rescue.holds(request.request_hash)
            while True:
                with self.store.before_paying(self.limits.stop):
                    found = self.ledger.try_acquire(
                        request.request_hash,
                        self.not_before,
                        waiting,
                        known_absent=known_absent,
                        has_answer=has_answer,
                    )
                if isinstance(found, Waiting):
                    place.wait()
                    return found
                if isinstance(found, Record):
                    if has_answer:
                        rescue.forget(found)
                    return self._had_rest(found, request)
                try:
                    with found as claim:
                        if has_answer:
                            paid = self.keeper.take_back(claim, self.result_key)
                        elif (paid := self._read_again(claim, request)) is None:
                            if before_sending is not None:
                                before_sending()
                            paid = _Sending(self, claim, request).pay(place)
                        if paid is not None:
                            return paid
                except ClaimLostError as lost:
                    # held up for too long: whoever took the claim over may have the answer by now
                    self.ledger.log.warning("%s", lost)
                waiting, known_absent, has_answer = None, False, False

    def look_up(self, request: ImageRequest) -> Paid | None:
        """Return the request's images if they are paid for, and send nothing."""
        record = self.ledger.look_up(request.request_hash, self.not_before)
        return Paid(record, sent=False) if record else None

    def _read_again(self, claim: Claim, request: ImageRequest) -> Paid | None:
        """Return what can be read by now of earlier answers; None where the request may be sent."""
        failed: tuple[TTAPIError, Kept] | None = None
        name, log = request.request_hash, self.ledger.log
        for kept in claim.unread:
            try:
                paid = self._read_kept(claim, request, kept)
            except TTAPIError as error:
                failed = failed or (error, kept)
                continue
            when = f"{kept.when:%Y-%m-%d %H:%M}"
            what = "request %s was paid for on %s UTC; its answer could be read now, and nothing was sent"
            log.info(what, name[:12], when)
            return paid
        if failed is None:
            return None
        failure, kept = failed
        failure.attempts, failure.answer, failure.kept_at = 0, None, self.keeper.place(name, kept)
        if self.ledger.keeps_from_sending(claim):
            raise failure
        log.warning("request %s is sent again as a decision of this run: %s", name[:12], failure)
        return None

    def _had_rest(self, found: Record, request: ImageRequest) -> Paid:
        """Return what is recorded, with those of its images that could not be had before, and can by now."""
        name, log, paid = request.request_hash, self.ledger.log, None
        try:
            claim = self.ledger.claim_rest(name) if found.rest else None
            if claim is not None and found.rest is not None:
                with claim:
                    paid = self._read_kept(claim, request, found.rest, found)
        except (TTAPIError, StoreError) as error:
            log.info("request %s: what is left of its answer is not had: %s", name[:12], error)
        if paid is None:
            return Paid(found, sent=False)
        had = len(paid.generation.images)
        log.info("request %s: %d of its images are had by now, and nothing was sent", name[:12], had)
        return paid

    def _read_kept(
        self, claim: Claim, request: ImageRequest, kept: Kept, found: Record | None = None
    ) -> Paid | None:
        """Store and record the images of an answer that was kept; None where no new one can be had.

        Args:
            found: what is recorded of the answer, where it was read in part.
        """
        keeper, stop = self.keeper, self.limits.stop
        raw = RawAnswer(keeper.body(request.request_hash, kept), kept.media_type)
        had = [image.index for image in found.generation.images] if found else []
        patience = 0 if found else self.store.patience
        answer = self.client.read_again(request, raw, had=had, patience=patience, stop=stop)
        if not answer.images:
            return None
        # with the bytes of those that were had before, should all of them have to wait in the rescue folder
        images = (*(keeper.images(found.generation) if found else ()), *answer.images)
        images = tuple(sorted(images, key=lambda image: image.index))
        made = generation_of(kept.generation, request.request_hash, self.store).model_copy(
            update={
                "images": tuple(map(self.store.reference, images)),
                "usage": answer.usage,
                "package_version": VERSION,
            }
        )
        recorded = Answer(
            token=kept.token,
            run_id=kept.run_id,
            generation=facts_of_generation(made),
            result_key=found.result_key if found else self.result_key,
        )
        rest = Unread(kept.model_copy(update={"whole": False}), answer.rest.body) if answer.rest else None
        return keeper.keep(claim, Read(recorded, images, rest), stop=stop)


class _Sending(Guard):
    """One request on its way under its claim.

    Asked right before bytes go to the API: stop, rate and budget of the run, room for the answer, the lease.
    """

    def __init__(self, engine: Engine, claim: Claim, request: ImageRequest) -> None:
        super().__init__(engine.limits.stop)
        self._engine = engine
        self._claim = claim
        self._request = request
        self._name = request.request_hash
        self._log = engine.ledger.log
        self._attempt = 0

    def pay(self, place: Place) -> Paid:
        """Send the request, and store and record its answer."""
        engine, answer = self._engine, self._ask()
        place.answered(answer)
        made = self._made(
            images=tuple(map(engine.store.reference, answer.images)),
            usage=answer.usage,
            api_calls=answer.attempts,
            seconds=round(answer.seconds, 3),
            request_id=answer.request_id,
            earlier_outcomes=answer.earlier_outcomes,
        )
        rest = None
        if answer.rest is not None:
            why = f"images that were had: {len(answer.images)}; others could not be fetched"
            rest = self._unread(made.model_copy(update={"images": ()}), answer.rest, why, whole=False)
            self._log.warning(
                "request %s: %s; the answer is kept, and the next run tries again", self._name[:12], why
            )
        hand = Read(self._claim.answer(made, engine.result_key), answer.images, rest)
        return engine.keeper.keep(self._claim, hand, stop=self.stop)

    def admit(self, attempt: int) -> None:
        """Ask all of it; the claim last, which each send, a repeated one too, needs to be proven to stand."""
        self._attempt = attempt
        self._engine.limits.admit(attempt)
        with _as_decision(attempt):
            check_room_for(self._request, self._engine.store)
            self._claim.before_sending()

    def confirm(self) -> None:
        """Ask for the stop, and for the age of the lease; a first send that is not made gives the claim back."""
        try:
            self.stop.check()
            with _as_decision(self._attempt):
                self._claim.before_writing()
        except (StoreError, StopSending):
            if self._attempt == 1:
                self._claim.release()
            raise

    def before_fetching(self, answer: RawAnswer) -> None:
        """Keep the answer on this machine: a process that is killed while it fetches images has paid for them.

        Where that fails, only a kill can harm it.
        """
        super().before_fetching(answer)
        made = self._made(api_calls=self._attempt, request_id=answer.request_id)
        hand = self._unread(made, answer, "its process ended while its images were fetched", whole=True)
        try:
            self._engine.keeper.rescue.put_meanwhile(self._name, hand)
        except StoreError as error:
            self._log.info("request %s is fetched without a copy: %s", self._name[:12], error)

    def _ask(self) -> GeneratedImages:
        """Return the answer to the request; where there is none, the claim says what became of it."""
        engine, claim, patience = self._engine, self._claim, self._engine.store.patience
        try:
            if self._request.stream or engine.on_preview is not None:
                events = engine.client.stream(self._request, self, patience=patience)
                return _read_stream(self._request, events, engine.on_preview)
            return engine.client.generate(self._request, self, patience=patience)
        except TTAPIError as error:
            if not perhaps_paid(error):
                claim.release()
            elif error.answer is not None:
                self._keep_unread(error, error.answer)
            else:
                claim.mark_unknown(str(error), error.outcome)
            raise
        except BaseException as interruption:  # Ctrl-C, SIGTERM, a time-out
            if self.in_hand is not None:
                why = f"{type(interruption).__name__} while its images were fetched"
                self._keep_unread(DownloadError(why, answer=self.in_hand), self.in_hand)
            raise

    def _keep_unread(self, error: TTAPIError, raw: RawAnswer) -> None:
        """Keep the answer of an error, and let the error say where."""
        made = self._made(
            api_calls=error.attempts, seconds=round(error.elapsed, 3), request_id=raw.request_id
        )
        # what was taken for an error has no images, whoever reads it
        is_whole = isinstance(error, InvalidResponseError | DownloadError) and error.taken_for is None
        hand = self._unread(made, raw, f"{error.outcome}: {error}", whole=is_whole)
        keeper = self._engine.keeper
        try:
            keeper.persist(self._claim, hand, stop=self.stop)
            error.kept_at, error.answer = keeper.place(self._name, hand.answer), None
        except NotStoredError as not_stored:
            error.kept_at = str(not_stored)
        self._log.warning("request %s: its answer can't be read: %s", self._name[:12], error)

    def _made(self, **facts: Any) -> Generation:
        """Return what this run has made of the request, just now."""
        engine = self._engine
        known = {
            "request": self._request,
            "request_hash": self._name,
            "api_origin": engine.client.api_origin,
            "created_at": datetime.now(UTC),
            "images": (),
            "flow_run_id": engine.run.flow_run_id,
            "task_run_id": engine.run.task_run_id,
            "package_version": VERSION,
        }
        return Generation(**known | facts)

    def _unread(self, made: Generation, raw: RawAnswer, why: str, *, whole: bool) -> Unread:
        """Return an answer that nobody can read yet; `made` is all that is known of it."""
        kept = Kept(
            token=self._claim.token,
            run_id=self._claim.run_id,
            generation=facts_of_generation(made),
            when=made.created_at,
            why=line_of(why),
            whole=whole,
            media_type=line_of(raw.media_type),
            size_bytes=raw.body.size_bytes,
            sha256=raw.body.sha256,
        )
        return Unread(kept, raw.body)


@contextmanager
def _as_decision(attempt: int) -> Iterator[None]:
    """Make of an error before a repeated send the decision not to send: the earlier send may be paid for."""
    try:
        yield
    except StoreError as error:
        if attempt == 1 or isinstance(error, ClaimLostError):
            raise
        raise StopSending(str(error)) from error


def _read_stream(
    request: ImageRequest,
    events: Iterable[PartialImage | CompletedImage],
    on_preview: OnPreview | None,
) -> GeneratedImages:
    """Return the completed images of a stream, as `TTAPIClient.generate` would."""
    started = time.monotonic()
    completed: list[CompletedImage] = []
    rest: RawAnswer | None = None
    try:
        for event in events:
            if isinstance(event, CompletedImage):
                completed.append(event)
            elif on_preview is not None:
                on_preview(event)
    except TTAPIError as error:
        if not completed:
            raise
        rest = error.answer if isinstance(error, DownloadError) else None
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
        rest=rest,
    )
