"""A claim on a request: whoever holds it, and only they, may send it and record the answer."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from prefect_ttapi.errors import Outcome, StoreError
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.documents import (
    Answer,
    Document,
    Documents,
    Payment,
    Record,
    Seen,
    State,
    Swap,
    packed,
    payment,
)
from prefect_ttapi.ledger.transitions import (
    answered,
    counts,
    facts_of,
    is_claim,
    released,
    resting,
    unknown,
)
from prefect_ttapi.results import Generation

#: From the standing document, what to write in its place; None: nothing.
Follow = Callable[[Document | None], dict[str, Any] | None]


class ClaimLostError(StoreError):
    """Somebody else holds the claim now, or has recorded an answer: nothing was sent; acquire it again."""


class Claim:
    """The right to send one request, for as long as it is renewed; use it in a `with` block.

    Within the block a background thread renews it. Left without `record`, `release` or `mark_unknown`, it
    becomes an unknown outcome if `before_sending` was called, and is released otherwise.

    Attributes:
        request_hash: what may be sent.
        maybe_paid: earlier sends whose outcome nobody knows.
    """

    def __init__(
        self,
        documents: Documents,
        request_hash: str,
        run_id: str,
        ttl: float,
        not_before: datetime | None,
        log: logging.Logger | logging.LoggerAdapter[Any],
        clock: Callable[[], float],
    ) -> None:
        self.request_hash = request_hash
        self.token = secrets.token_hex(16)
        self._documents = documents
        self._run_id = run_id
        self._ttl = ttl
        self._not_before = not_before
        self._log = log
        self._clock = clock
        self._sequence = 0
        self._seen: Seen | None = None
        self._lost = False
        self._sent = False
        self._settled = False
        self._unrenewed = False
        self._lease_from = 0.0
        self._lock = threading.Lock()  # one write at a time: a renewing thread's or the holder's
        self._renewer = leases.renewer()

    @property
    def maybe_paid(self) -> tuple[Payment, ...]:
        return self._seen.document.maybe_paid if self._seen else ()

    def take(self, seen: Seen | None, maybe_paid: tuple[Payment, ...], answer: Answer | None) -> Swap:
        """Write the claim in the place of what was seen; for the ledger."""
        leases.own(self)
        before = self._clock()
        standing = seen.document if seen else None
        try:
            swap = self._swap(
                seen,
                state=State.CLAIMED,
                holder=leases.this_process(self._run_id),
                ttl=self._ttl,
                answer=answer,
                maybe_paid=maybe_paid,
                also_paid=standing.also_paid if standing else (),
            )
        except BaseException:
            leases.disown(self)
            raise
        self._seen, self._lease_from = swap.seen, before
        if not swap.won:
            leases.disown(self)
        return swap

    def bury(self, seen: Seen, maybe_paid: tuple[Payment, ...]) -> Swap:
        """Write that a dead holder's request has an unknown outcome, and claim nothing; for the ledger."""
        return self._swap(seen, **{**resting(seen.document, State.UNKNOWN), "maybe_paid": maybe_paid})

    def __enter__(self) -> Self:
        self._renewer.add(self, self._lease_from + leases.RENEW_AFTER * self._ttl)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._sent and not self._settled:
                self.mark_unknown(f"{kind.__name__}: {error}" if kind else "left without an answer")
            elif not self._settled:
                self.release()
        finally:
            self._renewer.remove(self)
            leases.disown(self)

    def renew(self) -> float:
        """Renew if nobody is writing; when to come back. For the renewing threads."""
        if self._lock.acquire(blocking=False):
            try:
                self._renew()
                self._unrenewed = False
            except Exception as error:  # whatever it is, other claims need this thread
                if not self._unrenewed:
                    what = "the claim on request %s could not be renewed, which is tried again: %s"
                    self._log.warning(what, self._name, error)
                self._unrenewed = True
            finally:
                self._lock.release()
        due = self._lease_from + leases.RENEW_AFTER * self._ttl
        return max(due, self._clock() + leases.RETRY_AFTER * self._ttl)

    def before_sending(self) -> None:
        """Prove that the claim still stands: to be called right before the request is sent, each time.

        Raises:
            ClaimLostError: somebody else holds the claim now, or has recorded an answer.
            StoreError: it can't be proven. In either case, nothing may be sent.
        """
        with self._lock:
            if self._clock() - self._lease_from > leases.PROVE_AFTER * self._ttl and not self._lost:
                self._renew()
            self.before_writing()
            self._sent = True

    def before_writing(self) -> None:
        """See that the lease is still young, without asking the store: connecting may have taken long.

        Raises:
            ClaimLostError, StoreError: as `before_sending`.
        """
        if self._lost:
            raise ClaimLostError(f"the claim on request {self._name} was taken over: nothing was sent")
        if self._clock() - self._lease_from >= leases.SEND_UNTIL * self._ttl:
            raise StoreError(f"the claim on request {self._name} took too long to renew: nothing was sent")

    def record(self, generation: Generation, *, result_key: str | None = None) -> Record:
        """`record_answer` of this claim's own answer; its images are stored."""
        return self.record_answer(self.answer(generation, result_key))

    def answer(self, generation: Generation, result_key: str | None = None) -> Answer:
        """What there is to record of an answer to what was sent under this claim.

        Args:
            result_key: an opaque text to keep with the record.
        """
        return Answer(
            token=self.token, run_id=self._run_id, generation=packed(generation), result_key=result_key
        )

    def record_answer(self, answer: Answer) -> Record:
        """Record an answer, whose images are stored; the record that stands.

        That is somebody else's where theirs was first; this payment is then noted in its `also_paid`.

        Args:
            answer: this claim's, or an earlier one's that came to light before anything was sent under this.

        Raises:
            NoAnswerError: it may be recorded or not: try again.
            StoreError: it is not recorded.
        """
        with self._lock:
            seen = self._settle(
                lambda standing: answered(standing, answer, {answer.token, self.token}, self._stands)
            )
        assert seen is not None  # noqa: S101 - an answer always leaves a document
        record = self._documents.record(seen)
        assert record is not None  # noqa: S101 - and holds an answer
        if any(note.token == answer.token for note in record.also_paid):
            what = "request %s was paid for twice: the answer of run %s was recorded first, this run's is not used"
            self._log.warning(what, self._name, record.run_id)
        return record

    def counts(self, record: Record) -> bool:
        """Whether a record is young enough for who holds this claim."""
        return counts(record, self._not_before, self._run_id)

    def release(self) -> None:
        """Give the claim back: the request was surely not paid for.

        Where the store fails that is logged, as another error is on its way: the claim then counts as a dead
        holder's.
        """
        self._let_go(lambda standing: released(standing, self.token))

    def mark_unknown(self, message: str, outcome: str = Outcome.UNKNOWN) -> None:
        """The request was sent and may have been paid for: within this run it is not sent again by itself.

        Where the store fails that is logged, as in `release`, and comes to the same.
        """
        note = payment(self.token, self._run_id, f"{outcome}: {message}")
        self._let_go(lambda standing: unknown(standing, note))

    @property
    def _name(self) -> str:
        return self.request_hash[:12]

    def _renew(self) -> None:
        if self._lost or self._settled or self._seen is None:
            return
        before = self._clock()
        seen: Seen | None = self._seen
        # what stands may be an earlier renewal, whose answer was lost
        while seen is not None and is_claim(seen.document, self.token):
            swap = self._swap(seen, **facts_of(seen.document))
            self._seen = seen = swap.seen
            if swap.won:
                self._lease_from = before
                return
        self._lost = True
        self._log.warning("the claim on request %s is no longer held: somebody took it over", self._name)

    def _let_go(self, follow: Follow) -> None:
        try:
            with self._lock:
                self._settle(follow)
        except StoreError as error:
            self._settled = True
            self._log.warning("the claim on request %s stays until it expires: %s", self._name, error)

    def _settle(self, follow: Follow) -> Seen | None:
        """Write what follows from the standing document, whoever changes it meanwhile; what stands then.

        `follow` gives None where there is nothing to write.
        """
        won = False
        while not won and (facts := follow(self._seen.document if self._seen else None)) is not None:
            swap = self._swap(self._seen, **facts)
            won, self._seen = swap.won, swap.seen
        self._settled = True
        return self._seen

    def _swap(self, seen: Seen | None, **facts: Any) -> Swap:
        self._sequence += 1
        document = Document(
            request_hash=self.request_hash,
            api_origin=self._documents.api_origin,
            token=self.token,
            sequence=self._sequence,
            **facts,
        )
        return self._documents.swap(document, seen.tag if seen else None)

    def _stands(self, _: Document) -> bool:
        """Whether somebody else's answer is as good as one of this claim's own."""
        record = self._documents.record(self._seen) if self._seen else None
        return (
            record is not None
            and self.counts(record)
            and not self._documents.store.missing(record.generation.images)
        )
