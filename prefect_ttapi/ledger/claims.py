"""A claim on a request: its holder, and nobody else, may send it and record the answer. Threads here renew claims."""

from __future__ import annotations

import math
import os
import secrets
import threading
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Literal, Self

from prefect_ttapi.errors import Outcome, StoreError
from prefect_ttapi.ledger import leases, transitions
from prefect_ttapi.ledger.documents import (
    Answer,
    Document,
    Documents,
    Kept,
    Log,
    Payment,
    Record,
    Seen,
    State,
    Swap,
    facts_of_generation,
    payment,
)
from prefect_ttapi.results import Generation

#: Threads that renew the claims of a process: one connection that hangs must not let all others run out.
_MOST_THREADS: Final = 8


class ClaimLostError(StoreError):
    """Somebody else holds the claim now, or has recorded an answer: nothing was sent; acquire it again."""


@dataclass(eq=False)
class Claim:
    """The right to send one request, for as long as it is renewed; use it in a `with` block.

    Within the block a background thread renews it. Left without `record`, `release` or `mark_unknown`, it
    becomes an unknown outcome if `before_sending` was called, and is released otherwise.

    Attributes:
        request_hash: what may be sent.
        run_id: the run that pays.
        ttl: seconds for which the claim stands unrenewed.
        not_before: records older than this don't count, but for the run's own.
        token: names the claim.
    """

    documents: Documents
    request_hash: str
    run_id: str
    ttl: float
    not_before: datetime | None
    log: Log

    def __post_init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._sequence = 0
        self._seen: Seen | None = None
        self._lost = False
        self._sent = False
        self._settled = False
        self._unrenewed = False
        self._lease_from = 0.0
        self._lock = threading.Lock()  # one write at a time: a renewing thread's or the holder's

    @property
    def maybe_paid(self) -> tuple[Payment, ...]:
        """Earlier sends whose outcome nobody knows."""
        return self._seen.document.maybe_paid if self._seen else ()

    @property
    def kept(self) -> tuple[Kept, ...]:
        """Earlier answers that nobody could read, whether they count for the holder or not."""
        return self._seen.document.kept if self._seen else ()

    @property
    def unread(self) -> tuple[Kept, ...]:
        """Those of `kept` that are to be read before anything is sent, the last one first."""
        return transitions.unread(self._seen.document, self.not_before, self.run_id) if self._seen else ()

    def take(
        self,
        seen: Seen | None,
        maybe_paid: tuple[Payment, ...],
        answer: Answer | None,
        *,
        reads: Literal[True] | None = None,
    ) -> Swap:
        """Write the claim in the place of what was seen; for the ledger."""
        leases.live[self.token] = self
        before = leases.clock()
        won = False
        try:
            swap = self._swap(
                seen,
                state=State.CLAIMED,
                holder=leases.this_process(self.run_id).model_copy(update={"reads": reads}),
                ttl=self.ttl,
                answer=answer,
                maybe_paid=maybe_paid,
                also_paid=seen.document.also_paid if seen else (),
                kept=seen.document.kept if seen else (),
            )
            won, self._seen, self._lease_from = swap.won, swap.seen, before
        finally:
            if not won:
                leases.live.pop(self.token, None)
        return swap

    def leave_unknown(self, seen: Seen, note: Payment) -> Swap:
        """Write that a dead holder's request has an unknown outcome, and claim nothing; for the ledger."""
        return self._swap(seen, **transitions.resting(seen.document, State.UNKNOWN, note))

    def __enter__(self) -> Self:
        _renewer(os.getpid()).add(self, self._due)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if self._sent and not self._settled:
                self.mark_unknown(f"{kind.__name__}: {error}" if kind else "left without an answer")
            elif not self._settled:
                self.release()
        finally:
            _renewer(os.getpid()).remove(self)
            leases.live.pop(self.token, None)

    def renew(self) -> float:
        """Renew unless somebody is writing, and return when to come back; for the renewing threads."""
        if self._lock.acquire(blocking=False):
            try:
                self._renew()
                self._unrenewed = False
            except Exception as error:  # whatever it is, other claims need this thread
                if not self._unrenewed:
                    what = "the claim on request %s could not be renewed, which is tried again: %s"
                    self.log.warning(what, self._name, error)
                self._unrenewed = True
            finally:
                self._lock.release()
        return max(self._due, leases.clock() + leases.RETRY_AFTER * self.ttl)

    def before_sending(self) -> None:
        """Prove that the claim still stands: to be called right before the request is sent, each time.

        Raises:
            ClaimLostError: somebody else holds the claim now, or has recorded an answer.
            StoreError: it can't be proven. In either case, nothing may be sent.
        """
        with self._lock:
            if self._age > leases.PROVE_AFTER * self.ttl and not self._lost:
                self._renew()
            self.before_writing()
            self._sent = True

    def before_writing(self) -> None:
        """Check that the lease is still young, without asking the store: connecting may have taken long.

        Raises:
            ClaimLostError, StoreError: as `before_sending`.
        """
        if self._lost:
            raise ClaimLostError(f"the claim on request {self._name} was taken over: nothing was sent")
        if self._age >= leases.SEND_UNTIL * self.ttl:
            raise StoreError(f"the claim on request {self._name} took too long to renew: nothing was sent")

    def answer(self, generation: Generation, result_key: str | None = None) -> Answer:
        """Return what there is to record of an answer to what was sent under this claim.

        Args:
            result_key: an opaque text to keep with the record.
        """
        facts = facts_of_generation(generation)
        return Answer(token=self.token, run_id=self.run_id, generation=facts, result_key=result_key)

    def record_answer(self, answer: Answer, rest: Kept | None = None) -> Record:
        """Record an answer, whose images are stored, and return the record that stands.

        That is somebody else's where theirs was first; this payment is then noted in its `also_paid`.

        Args:
            answer: this claim's, or an earlier one's that came to light before anything was sent under this.
            rest: the same, where not all of its images could be had yet; its body is stored.

        Raises:
            NoAnswerError: it may be recorded or not: try again.
            StoreError: it is not recorded.
        """
        seen = self._settle(answer, rest)
        record = self.documents.record(seen) if seen else None
        assert record is not None  # noqa: S101 - a document with an answer stands now
        if any(note.token == answer.token for note in record.also_paid):
            what = "request %s was paid for twice: the answer of run %s was recorded first, this run's is not used"
            self.log.warning(what, self._name, record.run_id)
        return record

    def keep(self, answer: Kept) -> bool:
        """Note an answer that nobody can read, whose body is stored; return whether the document has it now.

        It has not where somebody else holds the claim by now, or has recorded an answer.

        Raises:
            NoAnswerError, StoreError: as `record_answer`.
        """
        self._settle(answer)
        return any(kept.token == answer.token for kept in self.kept)

    def counts(self, paid: Record | Kept) -> bool:
        """Return whether an answer is young enough for the holder of this claim."""
        return transitions.counts(paid, self.not_before, self.run_id)

    def release(self) -> None:
        """Give the claim back: the request was surely not paid for.

        Where the store fails that is logged, as another error is on its way: the claim then counts as a dead
        holder's.
        """
        self._let_go(None)

    def mark_unknown(self, message: str, outcome: str = Outcome.UNKNOWN) -> None:
        """Note that the request was sent and may be paid for: within this run it is not sent again by itself.

        Where the store fails that is logged, as in `release`, and comes to the same.
        """
        self._let_go(payment(self.token, self.run_id, f"{outcome}: {message}"))

    @property
    def _name(self) -> str:
        return self.request_hash[:12]

    @property
    def _age(self) -> float:
        return leases.clock() - self._lease_from

    @property
    def _due(self) -> float:
        return self._lease_from + leases.RENEW_AFTER * self.ttl

    def _renew(self) -> None:
        if self._lost or self._settled or self._seen is None:
            return
        before = leases.clock()
        seen: Seen | None = self._seen
        # what stands may be an earlier renewal, whose answer was lost
        while seen is not None and transitions.is_claim(seen.document, self.token):
            swap = self._swap(seen, **transitions.facts_of(seen.document))
            self._seen = seen = swap.seen
            if swap.won:
                self._lease_from = before
                return
        self._lost = True
        self.log.warning("the claim on request %s is no longer held: somebody took it over", self._name)

    def _let_go(self, note: Payment | None) -> None:
        try:
            self._settle(note)
        except StoreError as error:
            self._settled = True
            self.log.warning("the claim on request %s stays until it expires: %s", self._name, error)

    def _settle(self, end: Answer | Payment | None, rest: Kept | None = None) -> Seen | None:
        """Write how the claim ends, whoever changes the document meanwhile, and return what stands then.

        Args:
            end: the answer, read or kept unread; a payment that may have been made; None: surely nothing was paid.
            rest: of an answer that is read in part.
        """
        won = False
        with self._lock:
            while not won and (facts := self._facts_after(end, rest)) is not None:
                swap = self._swap(self._seen, **facts)
                won, self._seen = swap.won, swap.seen
            self._settled = True
            return self._seen

    def _facts_after(self, end: Answer | Payment | None, rest: Kept | None) -> dict[str, Any] | None:
        standing = self._seen.document if self._seen else None
        match end:
            case Kept():
                return transitions.unreadable(standing, self.token, end)
            case Answer():
                tokens, stands = {end.token, self.token}, self._is_answered_beside(end)
                return transitions.answered(standing, end, tokens, stands=stands, rest=rest)
            case Payment():
                return transitions.unknown(standing, end)
        return transitions.released(standing, self.token)

    def _is_answered_beside(self, answer: Answer) -> bool:
        """Return whether another answer stands that is as good as this one, images and all."""
        kept = self._seen.document.answer if self._seen else None
        if self._seen is None or kept is None or kept.token == answer.token:
            return False
        record = self.documents.record(self._seen)
        return (
            record is not None
            and self.counts(record)
            and not self.documents.store.missing(record.generation.images)
        )

    def _swap(self, seen: Seen | None, **facts: Any) -> Swap:
        self._sequence += 1
        document = Document(
            request_hash=self.request_hash,
            api_origin=self.documents.api_origin,
            token=self.token,
            sequence=self._sequence,
            replaced=transitions.replaced(seen.document if seen else None, facts),
            **facts,
        )
        return self.documents.swap(document, seen.tag if seen else None)


class _Renewer:
    """A few threads that renew all claims of the process. They end with the last, and start with the next ones."""

    def __init__(self) -> None:
        self._due: dict[str, tuple[float, Claim]] = {}
        self._changed = threading.Condition()
        self._threads = 0

    def add(self, claim: Claim, when: float) -> None:
        """Renew the claim from `when` on, on `leases.clock`."""
        with self._changed:
            self._due[claim.token] = when, claim
            if self._threads < min(len(self._due), _MOST_THREADS):
                self._threads += 1
                threading.Thread(target=self._run, name="ttapi-renewals", daemon=True).start()
            self._changed.notify()

    def remove(self, claim: Claim) -> None:
        """Leave the claim alone from now on."""
        with self._changed:
            self._due.pop(claim.token, None)
            if not self._due:
                self._changed.notify_all()

    def _run(self) -> None:
        while (claim := self._next()) is not None:
            again = claim.renew()
            with self._changed:
                if claim.token in self._due:
                    self._due[claim.token] = again, claim

    def _next(self) -> Claim | None:
        """Return the next claim, once it is due; None when there are none left."""
        with self._changed:
            while self._due:
                when, claim = min(self._due.values(), key=lambda due: due[0])
                if (wait := when - leases.clock()) <= 0:
                    self._due[claim.token] = math.inf, claim  # no other thread's, until it is renewed
                    return claim
                self._changed.wait(min(wait, threading.TIMEOUT_MAX))
            self._threads -= 1
            return None


@lru_cache(maxsize=1)
def _renewer(pid: int) -> _Renewer:  # noqa: ARG001 - threads don't survive a fork
    return _Renewer()
