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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Self

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.credentials import TTAPICredentials, shared_client
from prefect_ttapi.errors import DownloadError, InvalidResponseError, NotStoredError, StoreError, TTAPIError
from prefect_ttapi.generation.limits import SURELY_UNPAID, Limits, Place, SendGuard, perhaps_paid
from prefect_ttapi.generation.persisting import Keeper, Read, Unread
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
    GeneratedImage,
    GeneratedImages,
    Generation,
    PartialImage,
    RawAnswer,
)
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

_REST: Final = "the answer is kept, and the next run tries again"

#: Given each partial picture of a request that is read as a stream.
OnPreview = Callable[[PartialImage], None]

#: Called where a request is about to be sent; what it raises ends the request, unsent.
BeforeSending = Callable[[], None]


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
        """The answer as it is remembered."""
        return self.record.generation


def other_payments(paid: Paid) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what was paid for the request besides its images: perhaps, and surely but in vain. For people to read."""
    earlier = [outcome for outcome in paid.generation.earlier_outcomes if outcome not in SURELY_UNPAID]
    maybe = (
        *(f"an earlier send of the same call: {outcome}" for outcome in earlier),
        *(f"run {payment.run_id}: {payment.what}" for payment in paid.record.maybe_paid),
    )
    return maybe, tuple(f"run {payment.run_id}: {payment.what}" for payment in paid.record.also_paid)


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
    """

    client: TTAPIClient
    store: ImageStore
    ledger: Ledger
    run: RunContext
    limits: Limits = field(default_factory=Limits)
    not_before: datetime | None = None

    @classmethod
    def of(
        cls,
        credentials: TTAPICredentials,
        store: ImageStore,
        run: RunContext,
        *,
        limits: Limits,
        not_before: datetime | None,
        log: Log,
    ) -> Self:
        """Return the engine of a run, with the process's client for these credentials."""
        ledger = ledger_for(credentials, store, run.run_id, log)
        return cls(shared_client(credentials), store, ledger, run, limits, not_before)

    def generate(
        self, request: ImageRequest, *, result_key: str | None = None, on_preview: OnPreview | None = None
    ) -> Paid:
        """Return the request's images: from the store where they are already paid for, else from the API.

        While somebody else is paying, their record is waited for. What an earlier run paid for and could not store
        is taken from the store's rescue folder; what it paid for and could not read is read again.

        Args:
            result_key: kept in a new record, for the cache of the caller.
            on_preview: given each partial picture; the request is then read as a stream.

        Raises:
            StopSending, BudgetExceeded: nothing was sent.
            TTAPIError: the API did not give the images; the ledger knows whether it may be asked again. With no
                `attempts` it is about an earlier answer that is kept, and still can't be read.
            NotStoredError: paid for, but the store did not take it; the next run takes it from the rescue folder.
            StoreError: the store failed before anything was sent.
        """
        found = self.try_generate(request, result_key=result_key, on_preview=on_preview)
        while isinstance(found, Waiting):
            self.limits.stop.wait(found.pause)
            self.limits.stop.check()
            found = self.try_generate(request, found, result_key=result_key, on_preview=on_preview)
        return found

    def try_generate(
        self,
        request: ImageRequest,
        waiting: Waiting | None = None,
        *,
        known_absent: bool = False,
        before_sending: BeforeSending | None = None,
        result_key: str | None = None,
        on_preview: OnPreview | None = None,
    ) -> Paid | Waiting:
        """Do as `generate`, but return `Waiting` while somebody else is paying: hand it back after its `pause`.

        Args:
            known_absent: there was no record a moment ago: don't look before claiming.
            before_sending: called where nothing is known of the request, so that it is to be paid for.
        """
        keeper = Keeper(self.store, self.ledger.api_origin, self.ledger.log)
        with self.limits.place(request) as place:
            has_answer = keeper.holds(request.request_hash)
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
                        keeper.forget(found)
                    return self._had_rest(found, request, keeper) if found.rest else Paid(found, sent=False)
                try:
                    with found as claim:
                        if not has_answer:
                            paid = self._read_again(claim, request, result_key, keeper)
                            if paid is None:
                                if before_sending is not None:
                                    before_sending()
                                answer = self._ask(claim, request, on_preview, keeper)
                                paid = self._recorded(claim, request, answer, result_key, keeper, place)
                            return paid
                        if (taken := keeper.take_back(claim, result_key)) is not None:
                            return Paid(taken[0], sent=False, fresh=taken[1])
                except ClaimLostError as lost:
                    # held up for too long: whoever took the claim over may have the answer by now
                    self.ledger.log.warning("%s", lost)
                waiting, known_absent, has_answer = None, False, False

    def look_up(self, request: ImageRequest) -> Paid | None:
        """Return the request's images if they are paid for, and send nothing."""
        record = self.ledger.look_up(request.request_hash, self.not_before)
        return Paid(record, sent=False) if record else None

    def _recorded(
        self,
        claim: Claim,
        request: ImageRequest,
        answer: GeneratedImages,
        result_key: str | None,
        keeper: Keeper,
        place: Place,
    ) -> Paid:
        """Store and record an answer to what was sent under `claim`."""
        place.answered(answer)
        generation = self._generation(
            request,
            images=tuple(map(self.store.reference, answer.images)),
            usage=answer.usage,
            api_calls=answer.attempts,
            seconds=round(answer.seconds, 3),
            request_id=answer.request_id,
            earlier_outcomes=answer.earlier_outcomes,
        )
        rest = None
        if answer.rest is not None:
            facts = generation.model_copy(update={"images": ()})
            why = f"images that were had: {len(answer.images)}; others could not be fetched"
            kept = _kept(claim, facts, answer.rest, why, whole=False)
            rest = Unread(kept, answer.rest.body)
            self.ledger.log.warning("request %s: %s; %s", request.request_hash[:12], why, _REST)
        hand = Read(claim.answer(generation, result_key), answer.images, rest)
        record = keeper.keep(claim, hand, stop=self.limits.stop)
        keeper.remove(request.request_hash, claim.token)
        is_own = record.generation.images == generation.images
        return Paid(record, sent=True, fresh=answer.images if is_own else ())

    def _generation(self, request: ImageRequest, **facts: Any) -> Generation:
        """Return what this run has made of a request, just now."""
        return Generation(
            request=request,
            request_hash=request.request_hash,
            api_origin=self.client.api_origin,
            created_at=datetime.now(UTC),
            flow_run_id=self.run.flow_run_id,
            task_run_id=self.run.task_run_id,
            package_version=VERSION,
            **facts,
        )

    def _read_again(
        self, claim: Claim, request: ImageRequest, result_key: str | None, keeper: Keeper
    ) -> Paid | None:
        """Return what can be read by now of earlier answers; None where the request may be sent."""
        failed: tuple[TTAPIError, Kept] | None = None
        name, stop = request.request_hash, self.limits.stop
        for kept in claim.unread:
            try:
                raw = RawAnswer(keeper.body(name, kept), kept.media_type)
                answer = self.client.read_again(request, raw, patience=self.store.patience, stop=stop)
            except TTAPIError as error:
                failed = failed or (error, kept)
                continue
            images = tuple(map(self.store.reference, answer.images))
            record = keeper.keep(claim, self._read(kept, answer, result_key), stop=stop)
            self.ledger.log.info(
                "request %s was paid for on %s UTC; its answer could be read now, and nothing was sent",
                name[:12],
                f"{kept.when:%Y-%m-%d %H:%M}",
            )
            return Paid(record, sent=False, fresh=answer.images if record.generation.images == images else ())
        if failed is None:
            return None
        failure, kept = failed
        failure.attempts, failure.answer, failure.kept_at = 0, None, keeper.place(name, kept)
        if self.ledger.keeps_from_sending(claim):
            raise failure
        self.ledger.log.warning("request %s is sent again as a decision of this run: %s", name[:12], failure)
        return None

    def _had_rest(self, found: Record, request: ImageRequest, keeper: Keeper) -> Paid:
        """Return a record of which not all images could be had yet, with those that can by now."""
        paid, name, kept = Paid(found, sent=False), request.request_hash, found.rest
        assert kept is not None  # noqa: S101 - asked before
        try:
            claim = self.ledger.claim_rest(name)
            if claim is None:
                return paid
            with claim:
                answer = self._with_rest(found.generation, request, kept, keeper)
                if answer is None:
                    return paid
                record = keeper.keep(claim, self._read(kept, answer, found.result_key), stop=self.limits.stop)
        except (TTAPIError, StoreError) as error:
            self.ledger.log.info("request %s: what is left of its answer is not had: %s", name[:12], error)
            return paid
        had = len(record.generation.images)
        self.ledger.log.info(
            "request %s: %d of its images are had by now, and nothing was sent", name[:12], had
        )
        return Paid(record, sent=False)

    def _with_rest(
        self, made: Generation, request: ImageRequest, kept: Kept, keeper: Keeper
    ) -> GeneratedImages | None:
        """Return all images of an answer that can be had by now; None where there is no new one."""
        raw = RawAnswer(keeper.body(request.request_hash, kept), kept.media_type)
        had = {image.index for image in made.images}
        answer = self.client.read_again(request, raw, had=had, patience=0, stop=self.limits.stop)
        if not answer.images:
            return None
        # with their bytes, should all of them have to wait in the rescue folder
        together = sorted((*keeper.images(made), *answer.images), key=lambda image: image.index)
        return replace(answer, images=tuple(together))

    def _read(self, kept: Kept, answer: GeneratedImages, result_key: str | None) -> Read:
        """Return what could be read of an answer that was kept."""
        images = tuple(map(self.store.reference, answer.images))
        made = generation_of(kept.generation, kept.generation["request_hash"], self.store).model_copy(
            update={"images": images, "usage": answer.usage, "package_version": VERSION}
        )
        recorded = Answer(
            token=kept.token,
            run_id=kept.run_id,
            generation=facts_of_generation(made),
            result_key=result_key,
        )
        rest = Unread(kept.model_copy(update={"whole": False}), answer.rest.body) if answer.rest else None
        return Read(recorded, answer.images, rest)

    def _keep_unread(self, claim: Claim, request: ImageRequest, error: TTAPIError, keeper: Keeper) -> None:
        """Keep the answer of an error, and let the error say where."""
        raw = error.answer
        assert raw is not None  # noqa: S101 - asked before
        facts = self._generation(
            request,
            images=(),
            api_calls=error.attempts,
            seconds=round(error.elapsed, 3),
            request_id=error.request_id,
        )
        # what was taken for an error has no images, whoever reads it
        is_whole = isinstance(error, InvalidResponseError | DownloadError) and error.taken_for is None
        kept = _kept(claim, facts, raw, f"{error.outcome}: {error}", whole=is_whole)
        try:
            keeper.keep_unread(claim, Unread(kept, raw.body), stop=self.limits.stop)
            keeper.remove(request.request_hash, kept.token)
            error.kept_at, error.answer = keeper.place(request.request_hash, kept), None
        except NotStoredError as not_stored:
            error.kept_at = str(not_stored)
        self.ledger.log.warning("request %s: its answer can't be read: %s", request.request_hash[:12], error)

    def _keep_meanwhile(
        self, claim: Claim, request: ImageRequest, keeper: Keeper, raw: RawAnswer, api_calls: int
    ) -> None:
        """Keep an answer on this machine while its images are fetched; where that fails, only a kill can harm it."""
        facts = self._generation(request, images=(), api_calls=api_calls, request_id=raw.request_id)
        why = "its process ended while its images were fetched"
        try:
            keeper.put_meanwhile(
                request.request_hash, Unread(_kept(claim, facts, raw, why, whole=True), raw.body)
            )
        except StoreError as error:
            self.ledger.log.info("request %s is fetched without a copy: %s", request.request_hash[:12], error)

    def _ask(
        self, claim: Claim, request: ImageRequest, on_preview: OnPreview | None, keeper: Keeper
    ) -> GeneratedImages:
        """Return the answer to a claimed request; where there is none, the claim says what became of it."""
        keep = partial(self._keep_meanwhile, claim, request, keeper)
        guard = SendGuard(claim, request, self.store, self.limits, keep)
        try:
            if request.stream or on_preview is not None:
                events = self.client.stream(request, guard, patience=self.store.patience)
                return _read_stream(request, events, on_preview)
            return self.client.generate(request, guard, patience=self.store.patience)
        except TTAPIError as error:
            if not perhaps_paid(error):
                claim.release()
            elif error.answer is not None:
                self._keep_unread(claim, request, error, keeper)
            else:
                claim.mark_unknown(str(error), error.outcome)
            raise
        except BaseException as interruption:  # Ctrl-C, SIGTERM, a time-out
            if guard.in_hand is not None and (raw := guard.in_hand()) is not None:
                why = f"{type(interruption).__name__} while its images were fetched"
                self._keep_unread(claim, request, DownloadError(why, answer=raw), keeper)
            raise


def _kept(claim: Claim, facts: Generation, raw: RawAnswer, why: str, *, whole: bool) -> Kept:
    return Kept(
        token=claim.token,
        run_id=claim.run_id,
        generation=facts_of_generation(facts),
        when=facts.created_at,
        why=line_of(why),
        whole=whole,
        media_type=line_of(raw.media_type),
        size_bytes=raw.body.size_bytes,
        sha256=raw.body.sha256,
    )


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
