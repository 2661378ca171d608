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
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from prefect_ttapi.errors import UnknownOutcomeError
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import (
    LONGEST_TTL,
    Document,
    Documents,
    Payment,
    Record,
    Seen,
    State,
    payment,
)
from prefect_ttapi.ledger.transitions import counts
from prefect_ttapi.results import StoredImage
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: From images, those of them that are gone or cut short.
Missing = Callable[[Iterable[StoredImage]], list[StoredImage]]

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


class Ledger:
    """What is known of one API's answers in one store; as good as the store's conditional writes.

    Args:
        store: where images and records are.
        api_origin: who answers; the sandbox's and the real API's records are apart.
        run_id: the run that asks. Within one run a request is sent once unless opted in.
        ttl: seconds for which an unrenewed claim stands, at most an hour.
        on_dead_claim: what to do about the claim of a holder that died, perhaps after sending: "retry" takes it
            over, "unknown" notes it and raises, so that only a new run sends again.
        retry_unknown_outcome: send again within the same run, though it may be paid for twice.
        log: where to say what is waited for, taken over, sent again.
        clock: seconds that never go back, counting on while the machine sleeps.
    """

    def __init__(
        self,
        store: ImageStore,
        api_origin: str,
        run_id: str,
        *,
        ttl: float = leases.TTL,
        on_dead_claim: Literal["retry", "unknown"] = "retry",
        retry_unknown_outcome: bool = False,
        log: logging.Logger | logging.LoggerAdapter[Any] = logger,
        clock: Callable[[], float] = leases.clock,
    ) -> None:
        if not 0 < ttl <= LONGEST_TTL:
            raise ValueError(f"ttl must be more than 0 and at most {LONGEST_TTL:.0f} seconds, not {ttl}")
        if on_dead_claim not in ("retry", "unknown"):
            raise ValueError(f'on_dead_claim must be "retry" or "unknown", not {on_dead_claim!r}')
        self._store = store
        self._documents = Documents(store, api_origin)
        self._run_id = run_id
        self._ttl = ttl
        self._on_dead_claim = on_dead_claim
        self._retry_unknown_outcome = retry_unknown_outcome
        self._log = log
        self._clock = clock

    @property
    def api_origin(self) -> str:
        """Whose answers these are."""
        return self._documents.api_origin

    @property
    def log(self) -> logging.Logger | logging.LoggerAdapter[Any]:
        """Where to say what is waited for, taken over, sent again."""
        return self._log

    @property
    def prefix(self) -> str:
        """Every record's key is this, the request's hash and `.json`: one listing tells which there are."""
        return self._documents.prefix

    def key(self, request_hash: str) -> str:
        """The key of a request's record in the store."""
        return self._documents.key(request_hash)

    def look_up(
        self, request_hash: str, not_before: datetime | None = None, *, missing: Missing | None = None
    ) -> Record | None:
        """The request's images, if they were paid for and are there with the recorded size.

        Args:
            not_before: records older than this (with a time zone) don't count, but for the run's own.
            missing: tells which images are gone, where a listing has shown it; else the store is asked.

        Raises:
            StoreError: the store fails, or holds something that makes no sense under this hash.
        """
        seen = self._documents.read(request_hash)
        return self._hit(seen, not_before, missing or self._store.missing) if seen else None

    def acquire(
        self, request_hash: str, not_before: datetime | None = None, *, known_absent: bool = False
    ) -> Record | Claim:
        """The request's images, or else the right to send it; waits while somebody else has that right.

        Args:
            not_before: records older than this (with a time zone) don't count, but for the run's own.
            known_absent: there was no record a moment ago: don't look before claiming.

        Raises:
            UnknownOutcomeError: this very run has sent it before, and doesn't know what became of it.
            StoreError: the store fails. In either case, nothing may be sent.
        """
        found = self.try_acquire(request_hash, not_before, known_absent=known_absent)
        while isinstance(found, Waiting):
            time.sleep(found.pause)
            found = self.try_acquire(request_hash, not_before, found)
        return found

    def try_acquire(
        self,
        request_hash: str,
        not_before: datetime | None = None,
        waiting: Waiting | None = None,
        *,
        known_absent: bool = False,
        has_answer: bool = False,
    ) -> Record | Claim | Waiting:
        """As `acquire`, but gives `Waiting` instead of waiting: hand it back the next time.

        Args:
            has_answer: the claim is for recording an answer that is in hand, not for sending: what this run sent
                before is no obstacle.
        """
        if not_before is not None and not_before.tzinfo is None:
            raise ValueError("not_before needs a time zone: datetime.now(UTC)")
        self._store.check_once()
        # before the read: a claim that this read finds unchanged has stood at least until now
        asked = self._clock()
        seen = None if known_absent and waiting is None else self._documents.read(request_hash)
        while True:
            record = self._hit(seen, not_before, self._store.missing) if seen else None
            if record is not None:
                return record
            claimed = seen is not None and seen.document.state is State.CLAIMED
            if seen and claimed and not self._is_dead(seen, waiting, asked):
                return self._wait(seen, waiting)
            notes = self._maybe_paid(seen) if seen else ()
            own = () if has_answer else self._own(notes)
            if own and not claimed:
                raise _unknown(request_hash, own)
            claim = self._new_claim(request_hash, not_before)
            swap = (
                claim.bury(seen, notes)
                if own and seen
                else claim.take(seen, notes, self._kept(seen, not_before))
            )
            if not swap.won:
                seen = swap.seen
                continue
            if own:
                raise _unknown(request_hash, own)
            if notes and not has_answer:
                self._log.warning("%s", _perhaps_paid(request_hash, notes))
            return claim

    def _wait(self, seen: Seen, before: Waiting | None) -> Waiting:
        if before is None:
            self._log.info("%s", _who_holds(seen.document))
            return Waiting(seen, self._clock())
        same = before.claimed.tag == seen.tag
        since = before.since if same else self._clock()
        return Waiting(seen, since, min(_SLOWER * before.pause, _LONGEST_PAUSE))

    def _new_claim(self, request_hash: str, not_before: datetime | None) -> Claim:
        return Claim(
            self._documents, request_hash, self._run_id, self._ttl, not_before, self._log, self._clock
        )

    def _hit(self, seen: Seen, not_before: datetime | None, find_missing: Missing) -> Record | None:
        """The record, if it counts and its images are there."""
        record = self._documents.record(seen)
        if record is None or not counts(record, not_before, self._run_id):
            return None
        missing = find_missing(record.generation.images)
        # of a claimed one there is nothing to say: somebody is at it
        for image in missing if seen.document.state is State.GENERATED else ():
            self._log.warning(
                "request %s was paid for, but %s is gone or cut short: it counts as never generated",
                seen.document.request_hash[:12],
                image.uri,
            )
        return None if missing else record

    def _kept(self, seen: Seen | None, not_before: datetime | None) -> Any:
        """The answer to keep while a new one is made: an intact one that is only too old for this run."""
        record = self._documents.record(seen) if seen else None
        too_old = record is not None and not counts(record, not_before, self._run_id)
        return seen.document.answer if seen and too_old else None

    def _is_dead(self, seen: Seen, waiting: Waiting | None, asked: float) -> bool:
        """Whether a claim's holder is surely gone, or let its TTL pass while this process watched."""
        document = seen.document
        assert document.holder is not None  # noqa: S101 - decode refuses a claim without one
        if leases.is_gone(document.holder, document.token):
            return True
        return (
            waiting is not None and waiting.claimed.tag == seen.tag and asked - waiting.since >= document.ttl
        )

    def _maybe_paid(self, seen: Seen) -> tuple[Payment, ...]:
        """The sends of unknown outcome so far; a dead holder's claim is one of them."""
        document = seen.document
        if document.state is not State.CLAIMED or document.holder is None:
            return document.maybe_paid
        found_by = self._run_id if self._on_dead_claim == "unknown" else None
        what = "its holder died or was cut off, perhaps after sending"
        note = payment(document.token, document.holder.run_id, what, found_by)
        return (*document.maybe_paid, note)

    def _own(self, notes: tuple[Payment, ...]) -> tuple[Payment, ...]:
        """Those that keep this run from sending."""
        if self._retry_unknown_outcome:
            return ()
        return tuple(note for note in notes if self._run_id in (note.run_id, note.found_by))


def _unknown(request_hash: str, own: tuple[Payment, ...]) -> UnknownOutcomeError:
    last = own[-1]
    return UnknownOutcomeError(
        f"request {request_hash[:12]} was sent before, perhaps paid for ({last.what}; run {last.run_id}"
        f", noted {last.when:%Y-%m-%d %H:%M:%S} UTC); within one run it is not sent again: start a new run, "
        "or set retry_unknown_outcome",
        attempts=0,
    )


def _who_holds(document: Document) -> str:
    holder = document.holder
    who = f"run {holder.run_id} on {holder.host}" if holder else "another run"
    return f"request {document.request_hash[:12]} is being generated by {who}: waiting for its record"


def _perhaps_paid(request_hash: str, notes: tuple[Payment, ...]) -> str:
    last = notes[-1]
    return (
        f"request {request_hash[:12]} may already have been paid for by run {last.run_id} ({last.what}); "
        "it is sent again as a decision of this run"
    )
