"""What was paid for, and who may pay: one document for each request, in the same store as the images.

    absent ──► claimed ──► generated          its holder recorded an answer
                 │ ▲ ├───► released ──► ...   surely not paid for: anyone may claim it
                 │ │ └───► unknown ───► ...   perhaps paid for: a new run may claim it
                 └─┘ renewed; or taken over, once its holder is gone or was silent for a TTL

Payments for a request are at most one, and one more for each holder that died, or could not renew for a TTL,
between sending and recording: the API takes no token that could fence a late request off. Each of these is
named in the record.
"""

from __future__ import annotations

import logging
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from typing import Final, Literal

from prefect_ttapi.errors import UnknownOutcomeError
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import (
    LONGEST_TTL,
    Answer,
    Documents,
    Log,
    Payment,
    Record,
    Seen,
    State,
    payment,
    rest_of,
)
from prefect_ttapi.ledger.transitions import counts, unread
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Seconds between looks at somebody else's claim.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_SLOWER: Final = 1.5


@dataclass(frozen=True)
class Waiting:
    """Somebody else's claim stands.

    Attributes:
        claimed: their claim.
        since: when it was first seen with this tag, on `leases.clock`.
        pause: seconds until it is worth another look.
    """

    claimed: Seen
    since: float
    pause: float = _FIRST_PAUSE


@dataclass(eq=False)
class Ledger:
    """What is known of one API's answers in one store; as good as the store's conditional writes.

    Attributes:
        store: where images and records are.
        api_origin: who answers; the sandbox's and the real API's records are apart.
        run_id: the run that asks. Within one run a request is sent once unless opted in.
        ttl: seconds for which an unrenewed claim stands, at most an hour.
        on_dead_claim: what to do about the claim of a holder that died, perhaps after sending: "retry" takes it
            over, "unknown" notes it and raises, so that only a new run sends again.
        retry_unknown_outcome: send again within the same run, though it may be paid for twice.
        log: where to say what is waited for, taken over, sent again.
        documents: where the records are read and written.
    """

    store: ImageStore
    api_origin: str
    run_id: str
    _: KW_ONLY
    ttl: float = leases.TTL
    on_dead_claim: Literal["retry", "unknown"] = "retry"
    retry_unknown_outcome: bool = False
    log: Log = logger

    def __post_init__(self) -> None:
        if not 0 < self.ttl <= LONGEST_TTL:
            raise ValueError(f"ttl must be more than 0 and at most {LONGEST_TTL:.0f} seconds, not {self.ttl}")
        if self.on_dead_claim not in ("retry", "unknown"):
            raise ValueError(f'on_dead_claim must be "retry" or "unknown", not {self.on_dead_claim!r}')
        self.documents = Documents(self.store, self.api_origin)

    def look_up(
        self, request_hash: str, not_before: datetime | None = None, *, check_images: bool = True
    ) -> Record | None:
        """Return the request's images, if they were paid for and are there with the recorded size.

        Args:
            not_before: records older than this (with a time zone) don't count, but for the run's own.
            check_images: ask the store for the images, which it costs a call each; False where the caller knows.

        Raises:
            StoreError: the store fails, or holds something that makes no sense under this hash.
        """
        with self.store.before_paying():
            seen = self.documents.read(request_hash)
            return self._hit(seen, not_before, check_images=check_images) if seen else None

    def try_acquire(
        self,
        request_hash: str,
        not_before: datetime | None = None,
        waiting: Waiting | None = None,
        *,
        known_absent: bool = False,
        has_answer: bool = False,
    ) -> Record | Claim | Waiting:
        """Return the request's images, or else the right to send it, or who has that right.

        A claim with answers that are `unread` is for reading these first.

        Args:
            not_before: records older than this (with a time zone) don't count, but for the run's own.
            waiting: what was returned the last time, to be handed back after its `pause`.
            known_absent: there was no record a moment ago: don't look before claiming.
            has_answer: the claim is for recording an answer that is in hand, not for sending: what this run sent
                before is no obstacle.

        Raises:
            UnknownOutcomeError: this very run has sent it before, and doesn't know what became of it.
            StoreError: the store fails. In either case, nothing may be sent.
        """
        if not_before is not None and not_before.tzinfo is None:
            raise ValueError("not_before needs a time zone: datetime.now(UTC)")
        self.store.check_once()
        # before the read: a claim that this read finds unchanged has stood at least until now
        asked = leases.clock()
        seen = None if known_absent and waiting is None else self.documents.read(request_hash)
        while True:
            record = self._hit(seen, not_before) if seen else None
            if record is not None:
                return record
            claimed = seen is not None and seen.document.state is State.CLAIMED
            if seen and claimed and not self._is_dead(seen, waiting, asked):
                return self._wait(seen, waiting)
            notes = self._maybe_paid(seen) if seen else ()
            reads = has_answer or (seen is not None and bool(unread(seen.document, not_before, self.run_id)))
            own = () if reads else self._own(notes)
            if own and not claimed:
                raise _unknown(request_hash, own)
            claim = Claim(self.documents, request_hash, self.run_id, self.ttl, not_before, self.log)
            if own and seen:
                swap = claim.leave_unknown(seen, notes[-1])
            else:
                swap = claim.take(seen, notes, self._kept(seen, not_before))
            if not swap.won:
                seen = swap.seen
                continue
            if own:
                raise _unknown(request_hash, own)
            if notes and not reads:
                self.log.warning(
                    "request %s may already have been paid for by run %s (%s); it is sent again as a decision of "
                    "this run",
                    request_hash[:12],
                    notes[-1].run_id,
                    notes[-1].what,
                )
            return claim

    def sent(self, request_hash: str) -> bool:
        """Return whether this run may have sent a request, of which nobody tells the outcome any longer.

        Raises:
            StoreError: the store fails, or holds something that makes no sense.
        """
        with self.store.before_paying():
            seen = self.documents.read(request_hash)
        if seen is None:
            return False
        holder = seen.document.holder
        return (holder is not None and holder.run_id == self.run_id) or any(
            note.run_id == self.run_id for note in seen.document.maybe_paid
        )

    def claim_rest(self, request_hash: str) -> Claim | None:
        """Return a claim for having the `rest` of a recorded answer; None where somebody else is at it.

        Who can't be seen to live from here does not count: nothing is paid twice if two are at it.

        Raises:
            StoreError: the store fails.
        """
        seen = self.documents.read(request_hash)
        if seen is None or rest_of(seen.document) is None:
            return None
        state, holder = seen.document.state, seen.document.holder
        left = holder is not None and holder.reads and not leases.lives_here(holder, seen.document.token)
        if state is not State.GENERATED and not (state is State.CLAIMED and left):
            return None
        claim = Claim(self.documents, request_hash, self.run_id, self.ttl, None, self.log)
        swap = claim.take(seen, seen.document.maybe_paid, seen.document.answer, reads=True)
        return claim if swap.won else None

    def _wait(self, seen: Seen, before: Waiting | None) -> Waiting:
        if before is None:
            holder, name = seen.document.holder, seen.document.request_hash[:12]
            who = f"run {holder.run_id} on {holder.host}" if holder else "another run"
            self.log.info("request %s is being generated by %s: waiting for its record", name, who)
            return Waiting(seen, leases.clock())
        since = before.since if before.claimed.tag == seen.tag else leases.clock()
        return Waiting(seen, since, min(_SLOWER * before.pause, _LONGEST_PAUSE))

    def _hit(self, seen: Seen, not_before: datetime | None, *, check_images: bool = True) -> Record | None:
        """Return the record, if it counts and its images are there."""
        record = self.documents.record(seen)
        if record is None or not counts(record, not_before, self.run_id):
            return None
        missing = self.store.missing(record.generation.images) if check_images else []
        # of a claimed one there is nothing to say: somebody is at it
        for image in missing if seen.document.state is State.GENERATED else ():
            self.log.warning(
                "request %s was paid for, but %s is gone or cut short: it counts as never generated",
                seen.document.request_hash[:12],
                image.uri,
            )
        return None if missing else record

    def _kept(self, seen: Seen | None, not_before: datetime | None) -> Answer | None:
        """Return the answer to keep while a new one is made: an intact one that is only too old for this run."""
        record = self.documents.record(seen) if seen else None
        too_old = record is not None and not counts(record, not_before, self.run_id)
        return seen.document.answer if seen and too_old else None

    def _is_dead(self, seen: Seen, waiting: Waiting | None, asked: float) -> bool:
        """Return whether a claim's holder is surely gone, or let its TTL pass while this process watched."""
        document = seen.document
        assert document.holder is not None  # noqa: S101 - decode refuses a claim without one
        if leases.is_gone(document.holder, document.token):
            return True
        return (
            waiting is not None and waiting.claimed.tag == seen.tag and asked - waiting.since >= document.ttl
        )

    def _maybe_paid(self, seen: Seen) -> tuple[Payment, ...]:
        """Return the sends of unknown outcome so far; a dead holder's claim is one of them."""
        document = seen.document
        if document.state is not State.CLAIMED or document.holder is None or document.holder.reads:
            return document.maybe_paid
        found_by = self.run_id if self.on_dead_claim == "unknown" else None
        what = "its holder died or was cut off, perhaps after sending"
        note = payment(document.token, document.holder.run_id, what, found_by)
        return (*document.maybe_paid, note)

    def keeps_from_sending(self, claim: Claim) -> bool:
        """Return whether answers that are kept unread, or sends of this run, forbid to send under a claim."""
        whole = any(kept.whole for kept in claim.unread)
        return bool(self._own(claim.maybe_paid)) or (whole and not self.retry_unknown_outcome)

    def _own(self, notes: tuple[Payment, ...]) -> tuple[Payment, ...]:
        """Return those that keep this run from sending."""
        if self.retry_unknown_outcome:
            return ()
        return tuple(note for note in notes if self.run_id in (note.run_id, note.found_by))


def _unknown(request_hash: str, own: tuple[Payment, ...]) -> UnknownOutcomeError:
    last = own[-1]
    return UnknownOutcomeError(
        f"request {request_hash[:12]} was sent before, perhaps paid for ({last.what}; run {last.run_id}"
        f", noted {last.when:%Y-%m-%d %H:%M:%S} UTC); within one run it is not sent again: start a new run, "
        "or set retry_unknown_outcome",
        attempts=0,
    )
