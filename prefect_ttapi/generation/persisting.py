"""Paid answers are kept whatever the store does: tried again for minutes, and on this machine meanwhile."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from prefect_ttapi.errors import ImageMissingError, InvalidResponseError, NotStoredError, StoreError
from prefect_ttapi.generation.limits import SURELY_UNPAID
from prefect_ttapi.generation.rescue import UNREAD, Read, RescueFolder, Unread, bytes_in, image_in
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.ledger.claims import Claim, ClaimLostError
from prefect_ttapi.ledger.documents import Answer, Kept, Log, Record
from prefect_ttapi.results import GeneratedImage, Generation
from prefect_ttapi.stopping import Stop, backoff
from prefect_ttapi.storage.store import ImageStore

#: Seconds between attempts to store an answer: the first, and the longest.
_PAUSES: Final = (0.2, 5.0)


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
class Keeper:
    """Store images and record answers of one API in one store."""

    store: ImageStore
    api_origin: str
    log: Log

    @cached_property
    def rescue(self) -> RescueFolder:
        """What waits on this machine for the store."""
        return RescueFolder(self.store, self.api_origin, self.log)

    def keep(self, claim: Claim, hand: Read, *, rescued: bool = False, stop: Stop | None = None) -> Paid:
        """Persist an answer to the claimed request, and return what stands recorded.

        What nobody could read of earlier answers is given up. Arguments and errors are those of `persist`.
        """
        superseded = (*claim.kept, *([hand.rest.answer] if hand.rest else []))
        record = self.persist(claim, hand, rescued=rescued, stop=stop)
        assert record is not None  # noqa: S101 - what can be read is recorded
        for kept in (kept for kept in superseded if kept not in claim.kept):
            try:
                self.store.remove(self.rescue.key_of_body(claim.request_hash, kept))
            except StoreError as error:
                self.log.info("an answer that is needed no longer is left in the store: %s", error)
        # what stands may be somebody else's answer
        stored = [image.sha256 for image in record.generation.images]
        is_own = stored == [image.sha256 for image in hand.images]
        return Paid(record, sent=hand.answer.token == claim.token, fresh=hand.images if is_own else ())

    def place(self, request_hash: str, kept: Kept) -> str:
        """Return in words where an answer is kept that nobody could read, and what becomes of it."""
        then = (
            "sends nothing until refresh_cache, or prefect-ttapi verify --repair, says to pay anew"
            if kept.whole
            else "where that is in vain, sends the request anew"
        )
        where = self.store.uri(self.rescue.key_of_body(request_hash, kept))
        return f"it is kept at {where}: the next run reads it again, and {then}"

    def body(self, request_hash: str, kept: Kept) -> Spool:
        """Return the body of an answer that nobody could read.

        Raises:
            InvalidResponseError: it is gone or damaged.
            StoreError: the store fails.
        """
        try:
            return bytes_in(self.store, self.rescue.key_of_body(request_hash, kept), kept, "its body")
        except (ImageMissingError, ValueError) as error:
            raise InvalidResponseError(f"an answer was paid for and kept, but {error}") from None

    def images(self, made: Generation) -> tuple[GeneratedImage, ...]:
        """Return the images that the store has, with their bytes. StoreError: it fails, or one is damaged."""
        try:
            return tuple(image_in(self.store, image) for image in made.images)
        except ValueError as error:
            raise StoreError(f"{made.request_hash[:12]}: {error}") from None

    def take_back(self, claim: Claim, result_key: str | None) -> Paid | None:
        """Store an answer from the rescue folder, and return what stands recorded; None where none counts.

        An answer that nobody can read is brought into the store, which ends the claim: the next one is for reading it.
        """
        rescued = self.rescue.take(claim.request_hash)
        if rescued is None:
            return None
        read, record, paid = rescued.read, rescued.record, None
        unread = next((hand for hand in rescued.unread if claim.counts(hand.answer)), None)
        if read and record and claim.counts(record):
            answer = read.answer.model_copy(update={"result_key": result_key})
            paid = self.keep(claim, replace(read, answer=answer), rescued=True)
            when, what = record.generation.created_at, "its images were"
        elif unread:
            self.persist(claim, unread, rescued=True)
            when, what = unread.answer.when, "its answer was"
        else:
            return None
        self.log.info(
            "request %s was paid for on %s UTC and %s in the rescue folder: stored now, and nothing was sent",
            claim.request_hash[:12],
            f"{when:%Y-%m-%d %H:%M}",
            what,
        )
        return paid

    def persist(
        self, claim: Claim, hand: Read | Unread, *, rescued: bool = False, stop: Stop | None = None
    ) -> Record | None:
        """Store an answer, and end the claim with it; return the record that stands, if it was one that was read.

        At the first failure the answer goes to the rescue folder, where a kill or Ctrl-C can't harm it. Refusals are
        tried again as well as silence: credentials get renewed, and disks get room.

        Args:
            rescued: it is from the rescue folder.
            stop: once it is set, the answer goes to the rescue folder first: whoever asked for it may soon wait no
                longer, and a store that is slow or hangs shows no failure in time.

        Raises:
            NotStoredError: the store's patience is over, or somebody else holds the claim of an answer that was not
                read; the message says where the answer is.
        """
        name, give_up = claim.request_hash, time.monotonic() + self.store.patience
        there, where = rescued, ""
        unread = hand.rest if isinstance(hand, Read) else hand
        to_store: list[GeneratedImage | Spool] = [*hand.images] if isinstance(hand, Read) else []
        to_store += [unread.body] if unread else []
        for failures, pause in enumerate(backoff(*_PAUSES)):
            try:
                while to_store:
                    if not there and stop is not None and stop.reason is not None:
                        there, where = self._rescue(name, hand, there)
                    self._put(name, hand.answer, to_store[0])
                    to_store.pop(0)
                record = _end(claim, hand)
            except StoreError as error:
                there, where = self._rescue(name, hand, there)
                if isinstance(error, ClaimLostError) or time.monotonic() + pause > give_up:
                    if hand.answer.token == claim.token:
                        claim.mark_unknown(f"paid for, not stored; {where}")
                    raise NotStoredError(f"paid for, but not stored: {error}; {where}") from error
                if not failures:
                    what = "request %s is paid for, but not stored yet: %s; trying for %.0f s; meanwhile %s"
                    self.log.warning(what, name[:12], error, self.store.patience, where)
            except BaseException:  # Ctrl-C, a time-out
                self._rescue(name, hand, there)
                raise
            else:
                if isinstance(hand, Read) and (rescued or where):
                    self.rescue.remove(name)
                else:  # there may be more that people are to look at
                    self.rescue.remove_unread(name, hand.answer.token)
                return record
            time.sleep(pause)
        raise AssertionError("pauses have no end")

    def _put(self, request_hash: str, answer: Answer, part: GeneratedImage | Spool) -> None:
        if isinstance(part, Spool):
            self.store.objects.write(self.rescue.key_of_body(request_hash, answer), part.open, UNREAD)
            return
        # objects named by their content are shared: whose they are is the ledger's to say
        model = answer.generation["request"]["model"]
        self.store.put_image(part, {"request-hash": request_hash, "model": model})

    def _rescue(self, request_hash: str, hand: Read | Unread, there: bool) -> tuple[bool, str]:
        """Keep the answer on this machine, unless it is `there`; return whether it is then, and where, in words."""
        try:
            if not there:
                self.rescue.put(request_hash, hand)
            folder = self.rescue.folder(request_hash)
        except StoreError as error:
            return False, f"nor could it be kept on this machine: {error}"
        host = socket.gethostname()
        return True, f"kept on {host} in {folder}: the next run with this rescue folder takes it from there"


def _end(claim: Claim, hand: Read | Unread) -> Record | None:
    if isinstance(hand, Read):
        return claim.record_answer(hand.answer, hand.rest.answer if hand.rest else None)
    if not claim.keep(hand.answer):
        raise ClaimLostError("somebody else holds the claim by now")
    return None
