"""What is paid for is kept, whatever the store does: tried again for minutes, and on this machine meanwhile."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass
from typing import Any, Final

from prefect_ttapi.errors import NotStoredError, StoreError
from prefect_ttapi.generation.rescue import Rescue
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import Answer, Record
from prefect_ttapi.results import GeneratedImage
from prefect_ttapi.stopping import Stop, backoff
from prefect_ttapi.storage.store import ImageStore

#: Seconds between attempts: the first, and the longest.
_PAUSES: Final = (0.2, 5.0)


@dataclass(frozen=True)
class Keeper:
    """Stores images and records answers in one store, beside its rescue folder."""

    store: ImageStore
    rescue: Rescue
    log: logging.Logger | logging.LoggerAdapter[Any]

    def keep(
        self,
        claim: Claim,
        answer: Answer,
        images: tuple[GeneratedImage, ...],
        model: str,
        *,
        rescued: bool = False,
        stop: Stop | None = None,
    ) -> Record:
        """Store the images of an answer to the claimed request, record it, and return the record that stands.

        At the first failure the answer goes to the rescue folder, where a kill or Ctrl-C can't harm it. Refusals are
        tried again as well as silence: credentials get renewed, and disks get room.

        Args:
            rescued: it is from the rescue folder.
            stop: once it is set, the answer goes to the rescue folder first: whoever asked for it may soon wait no
                longer, and a store that is slow or hangs shows no failure in time.

        Raises:
            NotStoredError: the store's patience is over; the message says where the images are.
        """
        name, give_up = claim.request_hash, time.monotonic() + self.store.patience
        kept, where, warned = rescued, "", False
        to_store = list(images)
        # objects named by their content are shared: whose they are is the ledger's to say
        metadata = {"request-hash": name, "model": model}
        for pause in backoff(*_PAUSES):
            try:
                while to_store:
                    if not kept and stop is not None and stop.reason is not None:
                        kept, where = self._to_the_rescue(name, answer, images, kept)
                    self.store.put_image(to_store[0], metadata)
                    to_store.pop(0)
                record = claim.record_answer(answer)
            except StoreError as error:
                kept, where = self._to_the_rescue(name, answer, images, kept)
                if time.monotonic() + pause > give_up:
                    if answer.token == claim.token:
                        claim.mark_unknown(f"paid for, not stored; {where}")
                    raise NotStoredError(
                        f"paid for, but its images could not be stored: {error}; {where}"
                    ) from error
                if not warned:
                    what = "request %s is paid for, but not stored yet: %s; trying for %.0f s; meanwhile %s"
                    self.log.warning(what, name[:12], error, self.store.patience, where)
                    warned = True
            except BaseException:  # Ctrl-C, a time-out
                self._to_the_rescue(name, answer, images, kept)
                raise
            else:
                if rescued or where:
                    self.rescue.remove(name)
                return record
            time.sleep(pause)
        raise AssertionError("pauses have no end")

    def take_back(
        self, claim: Claim, result_key: str | None
    ) -> tuple[Record, tuple[GeneratedImage, ...]] | None:
        """The record of an answer from the rescue folder, with its images; None where there is none that counts."""
        rescued = self.rescue.take(claim.request_hash)
        if rescued is None or not claim.counts(rescued.record):
            return None
        answer = rescued.answer.model_copy(update={"result_key": result_key})
        made = rescued.record.generation
        record = self.keep(claim, answer, rescued.images, made.request.model, rescued=True)
        self.log.info(
            "request %s was paid for on %s UTC and its images were in the rescue folder: they are stored now, "
            "and nothing was sent",
            claim.request_hash[:12],
            f"{made.created_at:%Y-%m-%d %H:%M}",
        )
        return record, rescued.images

    def forget(self, record: Record) -> None:
        """Remove what is in the rescue folder of a standing record: whoever stored it had no time to."""
        try:
            rescued = self.rescue.take(record.generation.request_hash)
        except StoreError as error:
            self.log.warning("what the store has is left in the rescue folder: %s", error)
            return
        if rescued and rescued.record.generation.created_at == record.generation.created_at:
            self.rescue.remove(record.generation.request_hash)

    def _to_the_rescue(
        self, request_hash: str, answer: Answer, images: tuple[GeneratedImage, ...], there: bool
    ) -> tuple[bool, str]:
        """Keep the answer on this machine, unless it is `there`; whether it is then, and where, in words."""
        try:
            if not there:
                self.rescue.put(request_hash, answer, images)
            folder = self.rescue.folder(request_hash)
        except StoreError as error:
            return False, f"nor could they be kept on this machine: {error}"
        host = socket.gethostname()
        return True, f"kept on {host} in {folder}: the next run with this rescue folder takes it from there"
