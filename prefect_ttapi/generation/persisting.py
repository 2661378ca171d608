"""Paid answers are kept whatever the store does: tried again for minutes, and on this machine meanwhile.

What a store would not take is a small image store of its own, at
`<rescue folder>/<API origin>/<store>/<request hash>`: the images, and the ledger's record of them, which is written
last. So an answer is there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prefect_ttapi.errors import ImageMissingError, NotStoredError, StoreError
from prefect_ttapi.images.headers import ImageFacts, read_image
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import (
    Answer,
    Document,
    Documents,
    Log,
    Record,
    State,
    decode,
    encode,
    record_of,
)
from prefect_ttapi.results import GeneratedImage, StoredImage
from prefect_ttapi.stopping import Stop, backoff
from prefect_ttapi.storage.layout import image_key, slug_of
from prefect_ttapi.storage.objects import Facts
from prefect_ttapi.storage.store import ImageStore

#: Seconds between attempts to store an answer: the first, and the longest.
_PAUSES: Final = (0.2, 5.0)

_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True)
class Rescued:
    """An answer from the rescue folder, found to be whole: what to record, what that says, and the images' bytes."""

    answer: Answer
    record: Record
    images: tuple[GeneratedImage, ...]


@dataclass(frozen=True)
class Keeper:
    """Store images and record answers of one API in one store; hold in the rescue folder what waits for the store.

    Only folders of this user that nobody else may write to are trusted, and only as far as every image has the
    SHA-256, type and size that its record names.
    """

    store: ImageStore
    api_origin: str
    log: Log

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
                        kept, where = self._rescue(name, answer, images, kept)
                    self.store.put_image(to_store[0], metadata)
                    to_store.pop(0)
                record = claim.record_answer(answer)
            except StoreError as error:
                kept, where = self._rescue(name, answer, images, kept)
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
                self._rescue(name, answer, images, kept)
                raise
            else:
                if rescued or where:
                    self.remove(name)
                return record
            time.sleep(pause)
        raise AssertionError("pauses have no end")

    def take_back(
        self, claim: Claim, result_key: str | None
    ) -> tuple[Record, tuple[GeneratedImage, ...]] | None:
        """Store an answer from the rescue folder, and return its record and images; None where none counts.

        The record that stands may be of somebody else's answer: there are no images with it then.
        """
        rescued = self.take(claim.request_hash)
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
        return record, rescued.images if record.generation.images == made.images else ()

    def forget(self, record: Record) -> None:
        """Remove what is in the rescue folder of a standing record: whoever stored it had no time to."""
        try:
            rescued = self.take(record.generation.request_hash)
        except StoreError as error:
            self.log.warning("what the store has is left in the rescue folder: %s", error)
            return
        if rescued and rescued.record.generation.created_at == record.generation.created_at:
            self.remove(record.generation.request_hash)

    def folder(self, request_hash: str) -> Path:
        """Return where the answer to a request is kept. StoreError: this user has no home, and no folder is set."""
        identity = self.store.identity
        # for people the address, and a digest that no two stores share
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", identity).strip("-")[-80:]
        name = f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        return _root(self.store.rescue_folder) / slug_of(self.api_origin) / name / request_hash

    def holds(self, request_hash: str) -> bool:
        """Return whether there is something for this request, whole or not; False, with a warning, if it can't tell."""
        try:
            return self.folder(request_hash).is_dir()
        except StoreError:
            return False
        except OSError as error:
            self.log.warning("what may be in the rescue folder is not looked for: %s", error)
            return False

    def put(self, request_hash: str, answer: Answer, images: tuple[GeneratedImage, ...]) -> None:
        """Keep an answer, in the place of an older one to the same request.

        Raises:
            StoreError: the folder can't be written.
        """
        folder = self.folder(request_hash)
        try:
            # the folder, and the two above it that are the package's own, for this user only
            for part in (*reversed(folder.parents[:2]), folder):
                part.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"can't make {folder}: {error.strerror}") from error
        documents = self._documents(folder)
        for image in images:
            # also where there is something: it may be damaged
            key = image_key(image.sha256, image.media_type)
            documents.store.objects.write(key, image.open, Facts(image.media_type))
        document = Document(
            request_hash=request_hash,
            api_origin=self.api_origin,
            state=State.GENERATED,
            token=answer.token,
            sequence=0,
            answer=answer,
        )
        documents.store.write(documents.key(request_hash), encode(document), "application/json")

    def take(self, request_hash: str) -> Rescued | None:
        """Return the answer to a request; None where there is none, or one that is damaged, which the log says.

        It stays there until it is removed.

        Raises:
            StoreError: it can't be read now, say for a full temporary folder: whole or not, nobody knows.
        """
        folder = self.folder(request_hash)
        try:
            return self._read(folder, request_hash)
        except (StoreError, ValueError, OSError) as error:
            if not self.holds(request_hash):  # somebody else has put it into the store meanwhile
                return None
            if not isinstance(error, ValueError | ImageMissingError):
                why = f"{folder} has what is paid for, and can't be read: {error}"
                raise StoreError(f"{why}; nothing is sent while it stands: look, and try again") from error
            self.log.warning("%s is passed over: %s; look, and delete it", folder, error)
            return None

    def remove(self, request_hash: str) -> None:
        """Forget an answer, or what there is of it: the store has it."""
        if not self.holds(request_hash):
            return
        folder = self.folder(request_hash)
        documents = self._documents(folder)
        try:
            # first: whole or not at all
            documents.store.remove(documents.key(request_hash))
        except StoreError as error:
            self.log.warning("what the store has is left in the rescue folder: %s", error)
        shutil.rmtree(folder, ignore_errors=True)

    def _rescue(
        self, request_hash: str, answer: Answer, images: tuple[GeneratedImage, ...], there: bool
    ) -> tuple[bool, str]:
        """Keep the answer on this machine, unless it is `there`; return whether it is then, and where, in words."""
        try:
            if not there:
                self.put(request_hash, answer, images)
            folder = self.folder(request_hash)
        except StoreError as error:
            return False, f"nor could they be kept on this machine: {error}"
        host = socket.gethostname()
        return True, f"kept on {host} in {folder}: the next run with this rescue folder takes it from there"

    def _documents(self, folder: Path) -> Documents:
        return Documents(ImageStore(url=str(folder)), self.api_origin)

    def _read(self, folder: Path, request_hash: str) -> Rescued:
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            raise ValueError("it is not this user's")
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError("others may write to it")
        documents = self._documents(folder)
        data = documents.store.read(documents.key(request_hash))
        if data is None:
            raise ValueError("it was not finished, or is being removed")
        document = decode(data, request_hash, self.api_origin)
        record = record_of(document, self.store)
        if record is None or document.answer is None:
            raise ValueError("it names no images")
        images = tuple(_read_image(documents.store, image) for image in record.generation.images)
        return Rescued(document.answer, record, images)


def _root(rescue_folder: str | None) -> Path:
    try:
        if rescue_folder:
            return Path(rescue_folder).expanduser().absolute()
        # as its specification wants: a relative path doesn't count
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        home = state if state.is_absolute() else Path("~/.local/state").expanduser()
    except RuntimeError as error:
        raise StoreError(
            f"there is no place for a rescue folder ({error}): set the store's rescue_folder"
        ) from None
    return home / "prefect-ttapi" / "rescue"


def _read_image(place: ImageStore, expected: StoredImage) -> GeneratedImage:
    """Return an image with its bytes, copied out; ValueError: they are not those that were paid for."""
    spool = Spool()
    with place.open(place.uri(image_key(expected.sha256, expected.media_type))) as file:
        while spool.size_bytes <= expected.size_bytes and (chunk := file.read(_CHUNK)):
            spool.write(chunk)
    facts = ImageFacts(expected.media_type, expected.width, expected.height)
    intact = (spool.sha256, spool.size_bytes) == (expected.sha256, expected.size_bytes)
    if not intact or read_image(spool) != facts:
        raise ValueError(f"its image {expected.index} is damaged")
    known = expected.model_dump(include={"media_type", "width", "height", "index", "revised_prompt"})
    return GeneratedImage(spool, **known)
