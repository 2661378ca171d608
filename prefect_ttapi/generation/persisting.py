"""Paid answers are kept whatever the store does: tried again for minutes, and on this machine meanwhile.

What a store would not take is a small image store of its own, at
`<rescue folder>/<API origin>/<store>/<request hash>`: the images, or the body of an answer that nobody can read yet,
and the ledger's document about them, which is written last. So an answer is there as a whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from prefect_ttapi.errors import ImageMissingError, InvalidResponseError, NotStoredError, StoreError
from prefect_ttapi.images.headers import ImageFacts, read_image
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.ledger.claims import Claim, ClaimLostError
from prefect_ttapi.ledger.documents import (
    Answer,
    Document,
    Documents,
    Kept,
    Log,
    Record,
    State,
    decode,
    encode,
    record_of,
)
from prefect_ttapi.ledger.leases import is_gone
from prefect_ttapi.results import GeneratedImage, Generation, StoredImage
from prefect_ttapi.stopping import Stop, backoff
from prefect_ttapi.storage.layout import answer_key, image_key, is_sha256, slug_of
from prefect_ttapi.storage.objects import Facts
from prefect_ttapi.storage.store import ImageStore

#: Seconds between attempts to store an answer: the first, and the longest.
_PAUSES: Final = (0.2, 5.0)

_CHUNK: Final = 1024 * 1024

#: Rescue folders that this process has found to be writable.
_writable: set[Path] = set()

logger = logging.getLogger(__name__)


#: Its body is somebody else's text, which no browser should take for a page of whoever owns the bucket.
_UNREAD: Final = Facts("application/octet-stream")


@dataclass(frozen=True)
class Unread:
    """An answer in hand that nobody can read yet: what to note of it, and its body as it came."""

    answer: Kept
    body: Spool


@dataclass(frozen=True)
class Read:
    """An answer in hand: what to record of it, its images, and all of it where some of these could not be had."""

    answer: Answer
    images: tuple[GeneratedImage, ...]
    rest: Unread | None = None


@dataclass(frozen=True)
class Rescued:
    """What the rescue folder has of a request, found to be whole; `record` is what `read` says."""

    read: Read | None
    record: Record | None
    unread: tuple[Unread, ...]


@dataclass(frozen=True)
class Keeper:
    """Store images and record answers of one API in one store; hold in the rescue folder what waits for the store.

    Only folders of this user that nobody else may write to are trusted, and only as far as every image, and every body
    of an answer, has the SHA-256, type and size that its record names.
    """

    store: ImageStore
    api_origin: str
    log: Log

    def keep(self, claim: Claim, hand: Read, *, rescued: bool = False, stop: Stop | None = None) -> Record:
        """Store the images of an answer to the claimed request, record it, and return the record that stands.

        At the first failure the answer goes to the rescue folder, where a kill or Ctrl-C can't harm it. Refusals are
        tried again as well as silence: credentials get renewed, and disks get room. What nobody could read of earlier
        answers is given up.

        Args:
            rescued: it is from the rescue folder.
            stop: once it is set, the answer goes to the rescue folder first: whoever asked for it may soon wait no
                longer, and a store that is slow or hangs shows no failure in time.

        Raises:
            NotStoredError: the store's patience is over; the message says where the images are.
        """
        superseded = (*claim.kept, *([hand.rest.answer] if hand.rest else []))
        record = self._persist(claim, hand, rescued, stop)
        assert record is not None  # noqa: S101 - what can be read is recorded
        for kept in (kept for kept in superseded if kept not in claim.kept):
            try:
                self.store.remove(self._key(claim.request_hash, kept))
            except StoreError as error:
                self.log.info("an answer that is needed no longer is left in the store: %s", error)
        return record

    def keep_unread(
        self, claim: Claim, hand: Unread, *, rescued: bool = False, stop: Stop | None = None
    ) -> None:
        """Store an answer that nobody can read yet, as `keep` does, and note it; that ends the claim.

        Raises:
            NotStoredError: as `keep`, or somebody else holds the claim by now.
        """
        self._persist(claim, hand, rescued, stop)

    def place(self, request_hash: str, kept: Kept) -> str:
        """Return in words where an answer is kept that nobody could read, and what becomes of it."""
        then = (
            "sends nothing until refresh_cache, or prefect-ttapi verify --repair, says to pay anew"
            if kept.whole
            else "where that is in vain, sends the request anew"
        )
        return f"it is kept at {self.store.uri(self._key(request_hash, kept))}: the next run reads it again, and {then}"

    def body(self, request_hash: str, kept: Kept) -> Spool:
        """Return the body of an answer that nobody could read.

        Raises:
            InvalidResponseError: it is gone or damaged.
            StoreError: the store fails.
        """
        try:
            return _body(self.store, self._key(request_hash, kept), kept)
        except (ImageMissingError, ValueError) as error:
            raise InvalidResponseError(f"an answer was paid for and kept, but {error}") from None

    def images(self, made: Generation) -> tuple[GeneratedImage, ...]:
        """Return the images that the store has, with their bytes. StoreError: it fails, or one is damaged."""
        try:
            return tuple(_image(self.store, image) for image in made.images)
        except ValueError as error:
            raise StoreError(f"{made.request_hash[:12]}: {error}") from None

    def take_back(
        self, claim: Claim, result_key: str | None
    ) -> tuple[Record, tuple[GeneratedImage, ...]] | None:
        """Store an answer from the rescue folder, and return its record and images; None where none counts.

        The record that stands may be of somebody else's answer: there are no images with it then. An answer that nobody
        can read is brought into the store, which ends the claim: the next one is for reading it.
        """
        rescued = self.take(claim.request_hash)
        said = (
            "request %s was paid for on %s UTC and %s in the rescue folder: stored now, and nothing was sent"
        )
        if rescued and rescued.read and rescued.record and claim.counts(rescued.record):
            answer = rescued.read.answer.model_copy(update={"result_key": result_key})
            made, images = rescued.record.generation, rescued.read.images
            rest = next((hand for hand in rescued.unread if hand.answer.token == answer.token), None)
            record = self.keep(claim, Read(answer, images, rest), rescued=True)
            self.log.info(said, claim.request_hash[:12], _minute(made.created_at), "its images were")
            return record, images if record.generation.images == made.images else ()
        unread = rescued.unread if rescued else ()
        if (hand := next((hand for hand in unread if claim.counts(hand.answer)), None)) is not None:
            self.keep_unread(claim, hand, rescued=True)
            self.log.info(said, claim.request_hash[:12], _minute(hand.answer.when), "its answer was")
        return None

    def forget(self, record: Record) -> None:
        """Remove what is in the rescue folder of a standing record: whoever stored it had no time to."""
        try:
            if self.is_stored(record):
                self.remove(record.generation.request_hash)
        except StoreError as error:
            self.log.warning("what the store has is left in the rescue folder: %s", error)

    def is_stored(self, record: Record) -> bool:
        """Return whether a standing record has all that is in the rescue folder of its request.

        Raises:
            StoreError: it can't be read now.
        """
        made = record.generation
        rescued = self.take(made.request_hash)
        if rescued is None or any(hand.answer.when > made.created_at for hand in rescued.unread):
            return False
        return rescued.record is None or rescued.record.generation.created_at == made.created_at

    def rescued(self) -> Iterator[str]:
        """Yield the requests that have something in the rescue folder, whole or not.

        Raises:
            StoreError: it can't be read.
        """
        for place in _trusted(self.store.rescue_folder):
            folder = place / self._below
            try:
                yield from (found.name for found in sorted(folder.glob("*")) if is_sha256(found.name))
            except OSError as error:
                raise StoreError(f"can't read {folder}: {error.strerror}") from error

    def waiting(self) -> tuple[int, Path | None]:
        """Return how many answers wait in the rescue folder, and where; none where it can't be read."""
        try:
            found = [each for each in self.rescued() if not self._is_under_way(each)]
            return len(found), self.folder(found[0]).parent if found else None
        except StoreError as error:
            self.log.warning("what may be in the rescue folder is not looked for: %s", error)
            return 0, None

    def _is_under_way(self, request_hash: str) -> bool:
        """Return whether somebody is at work on a request, whose answer is kept meanwhile."""
        try:
            seen = Documents(self.store, self.api_origin).read(request_hash)
        except StoreError:
            return False
        holder = seen.document.holder if seen and seen.document.state is State.CLAIMED else None
        return holder is not None and seen is not None and not is_gone(holder, seen.document.token)

    def folder(self, request_hash: str) -> Path:
        """Return where the answer to a request is kept, or would be. StoreError: it could be kept nowhere."""
        places = (place / self._below / request_hash for place in _trusted(self.store.rescue_folder))
        there = next(filter(os.path.isdir, places), None)
        return there or rescue_place(self.store.rescue_folder) / self._below / request_hash

    @property
    def _below(self) -> Path:
        identity = self.store.identity
        # for people the address, and a digest that no two stores share
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", identity).strip("-")[-80:]
        name = f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        return Path(slug_of(self.api_origin), name)

    def holds(self, request_hash: str) -> bool:
        """Return whether there is something for this request, whole or not; False, with a warning, if it can't tell."""
        try:
            below = self._below / request_hash
            return any((place / below).is_dir() for place in _trusted(self.store.rescue_folder))
        except StoreError:
            return False
        except OSError as error:
            self.log.warning("what may be in the rescue folder is not looked for: %s", error)
            return False

    def put_meanwhile(self, request_hash: str, hand: Unread) -> None:
        """Keep an answer until its images are fetched and stored, but beside nothing that people are to look at."""
        if not self.holds(request_hash) or self._standing(self.folder(request_hash), request_hash):
            self.put(request_hash, hand)

    def put(self, request_hash: str, hand: Read | Unread) -> None:
        """Keep an answer, in the place of older ones to the same request; one that nobody can read, beside them.

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
        objects = documents.store.objects
        facts: dict[str, Any] = {}
        if isinstance(hand, Unread):
            objects.write(self._key(request_hash, hand.answer), hand.body.open, _UNREAD)
            standing = self._standing(folder, request_hash)
            facts = {"answer": standing.answer, "kept": standing.kept} if standing else {}
            facts["kept"] = (*_others(facts.get("kept", ()), hand.answer.token), hand.answer)
        else:
            for image in hand.images:
                # also where there is something: it may be damaged
                key = image_key(image.sha256, image.media_type)
                objects.write(key, image.open, Facts(image.media_type))
            facts = {"answer": hand.answer}
            if hand.rest is not None:
                objects.write(self._key(request_hash, hand.rest.answer), hand.rest.body.open, _UNREAD)
                facts["kept"] = (hand.rest.answer,)
        self._write(documents, request_hash, facts)

    def take(self, request_hash: str) -> Rescued | None:
        """Return the answers to a request; None where there are none, or one is damaged, which the log says.

        They stay there until they are removed.

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

    def remove(self, request_hash: str, token: str | None = None) -> None:
        """Forget what the store has: all there is of a request, or (`token`) one answer that was not read."""
        if not self.holds(request_hash):
            return
        folder = self.folder(request_hash)
        documents = self._documents(folder)
        try:
            if token:
                standing = self._standing(folder, request_hash)
                others = _others(standing.kept, token) if standing else ()
                if standing is None or len(others) == len(standing.kept):
                    return  # it is not there
                if others or standing.answer:
                    self._write(documents, request_hash, {"answer": standing.answer, "kept": others})
                    documents.store.remove(answer_key(self._slug, request_hash, token))
                    return
            # first: whole or not at all
            documents.store.remove(documents.key(request_hash))
        except StoreError as error:
            self.log.warning("what the store has is left in the rescue folder: %s", error)
            if token:
                return
        shutil.rmtree(folder, ignore_errors=True)

    def _persist(self, claim: Claim, hand: Read | Unread, rescued: bool, stop: Stop | None) -> Record | None:
        name, give_up = claim.request_hash, time.monotonic() + self.store.patience
        there, where, warned = rescued, "", False
        unread = hand.rest if isinstance(hand, Read) else hand
        to_store: list[GeneratedImage | Spool] = [*hand.images] if isinstance(hand, Read) else []
        to_store += [unread.body] if unread else []
        for pause in backoff(*_PAUSES):
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
                if not warned:
                    what = "request %s is paid for, but not stored yet: %s; trying for %.0f s; meanwhile %s"
                    self.log.warning(what, name[:12], error, self.store.patience, where)
                    warned = True
            except BaseException:  # Ctrl-C, a time-out
                self._rescue(name, hand, there)
                raise
            else:
                if rescued or where:
                    self.remove(name, hand.answer.token if isinstance(hand, Unread) else None)
                return record
            time.sleep(pause)
        raise AssertionError("pauses have no end")

    def _put(self, request_hash: str, answer: Answer, part: GeneratedImage | Spool) -> None:
        if isinstance(part, Spool):
            self.store.objects.write(answer_key(self._slug, request_hash, answer.token), part.open, _UNREAD)
            return
        # objects named by their content are shared: whose they are is the ledger's to say
        model = answer.generation["request"]["model"]
        self.store.put_image(part, {"request-hash": request_hash, "model": model})

    def _rescue(self, request_hash: str, hand: Read | Unread, there: bool) -> tuple[bool, str]:
        """Keep the answer on this machine, unless it is `there`; return whether it is then, and where, in words."""
        try:
            if not there:
                self.put(request_hash, hand)
            folder = self.folder(request_hash)
        except StoreError as error:
            return False, f"nor could it be kept on this machine: {error}"
        host = socket.gethostname()
        return True, f"kept on {host} in {folder}: the next run with this rescue folder takes it from there"

    @property
    def _slug(self) -> str:
        return slug_of(self.api_origin)

    def _key(self, request_hash: str, kept: Kept) -> str:
        return answer_key(self._slug, request_hash, kept.token)

    def _documents(self, folder: Path) -> Documents:
        return Documents(ImageStore(url=str(folder)), self.api_origin)

    def _write(self, documents: Documents, request_hash: str, facts: Mapping[str, Any]) -> None:
        document = Document(
            request_hash=request_hash,
            api_origin=self.api_origin,
            state=State.GENERATED if facts.get("answer") else State.UNKNOWN,
            token=secrets.token_hex(16),
            sequence=0,
            **facts,
        )
        documents.store.write(documents.key(request_hash), encode(document), "application/json")

    def _document(self, folder: Path, request_hash: str) -> Document:
        """Return what a folder says it has. ValueError: it is not to be trusted, or was not finished."""
        if (why := _why_not_ours(folder)) is not None:
            raise ValueError(why)
        documents = self._documents(folder)
        data = documents.store.read(documents.key(request_hash))
        if data is None:
            raise ValueError("it was not finished, or is being removed")
        return decode(data, request_hash, self.api_origin)

    def _standing(self, folder: Path, request_hash: str) -> Document | None:
        try:
            return self._document(folder, request_hash)
        except (ValueError, OSError):
            return None

    def _read(self, folder: Path, request_hash: str) -> Rescued:
        document, place = self._document(folder, request_hash), ImageStore(url=str(folder))
        record, read = record_of(document, self.store), None
        if record is not None and document.answer is not None:
            images = tuple(_image(place, image) for image in record.generation.images)
            read = Read(document.answer, images)
        kept = document.kept
        unread = tuple(Unread(each, _body(place, self._key(request_hash, each), each)) for each in kept)
        if read is None and not unread:
            raise ValueError("it names no images")
        return Rescued(read, record, unread)


def _others(kept: Iterable[Kept], token: str | None) -> tuple[Kept, ...]:
    return tuple(each for each in kept if each.token != token)


def _end(claim: Claim, hand: Read | Unread) -> Record | None:
    if isinstance(hand, Read):
        return claim.record_answer(hand.answer, hand.rest.answer if hand.rest else None)
    if not claim.keep(hand.answer):
        raise ClaimLostError("somebody else holds the claim by now")
    return None


def _minute(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}"


def rescue_place(rescue_folder: str | None) -> Path:
    """Return where this machine keeps answers that a store does not take, found to be writable in this process.

    Where none is named, and the user's own can't be written, it is in the temporary folder, which a warning says.

    Args:
        rescue_folder: of the store.

    Raises:
        StoreError: there is no such place, so that nothing may be sent.
    """
    troubles: list[str] = []
    for place in _places(rescue_folder):
        if place in _writable:
            return place
        try:
            _try_to_write(place)
        except OSError as error:
            troubles.append(f"{place}: {error.strerror}")
            continue
        if troubles:
            logger.warning(
                "the rescue folder can't be written (%s): answers that a store does not take are kept in the temporary "
                "folder, %s; set the store's rescue_folder, or XDG_STATE_HOME, to a folder that stays",
                *troubles,
                place,
            )
        _writable.add(place)
        return place
    raise StoreError(
        f"nothing is sent: an answer that the store does not take could not be kept on this machine "
        f"({'; '.join(troubles)}): set the store's rescue_folder to a folder that can be written"
    )


def _try_to_write(place: Path) -> None:
    place.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    if place == _temporary_place() and (why := _why_not_ours(place)) is not None:
        raise PermissionError(errno.EACCES, why)
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"written by prefect-ttapi, to see whether answers can be kept here")


def _places(rescue_folder: str | None) -> tuple[Path, ...]:
    """Return where answers may wait, the first choice first."""
    try:
        if rescue_folder:
            return (Path(rescue_folder).expanduser().absolute(),)
        # as its specification wants: a relative path doesn't count
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        home = state if state.is_absolute() else Path("~/.local/state").expanduser()
    except RuntimeError as error:
        if not rescue_folder:
            return (_temporary_place(),)
        raise StoreError(
            f"there is no place for a rescue folder ({error}): set the store's rescue_folder"
        ) from None
    return home / "prefect-ttapi" / "rescue", _temporary_place()


def _trusted(rescue_folder: str | None) -> list[Path]:
    """Return where answers may be found; in the temporary folder, anybody may make what looks like ours."""
    temporary = _temporary_place()
    return [place for place in _places(rescue_folder) if place != temporary or _is_ours(place)]


def _temporary_place() -> Path:
    try:
        return Path(tempfile.gettempdir(), f"prefect-ttapi-{os.geteuid()}")
    except FileNotFoundError:  # there is no such folder, nor can there be one below what is none
        return Path(os.devnull, "rescue")


def _is_ours(folder: Path) -> bool:
    try:
        return _why_not_ours(folder) is None
    except OSError:
        return False


def _why_not_ours(folder: Path) -> str | None:
    """Return why a folder is not to be trusted; None where only this user may write to it."""
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        return "it is not this user's"
    return "others may write to it" if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def _image(place: ImageStore, expected: StoredImage) -> GeneratedImage:
    """Return an image with its bytes, copied out; ValueError: they are not those that were paid for."""
    wrong = ValueError(f"its image {expected.index} is damaged")
    spool = _copied(place, image_key(expected.sha256, expected.media_type), expected, wrong)
    if read_image(spool) != ImageFacts(expected.media_type, expected.width, expected.height):
        raise wrong
    known = expected.model_dump(include={"media_type", "width", "height", "index", "revised_prompt"})
    return GeneratedImage(spool, **known)


def _body(place: ImageStore, key: str, expected: Kept) -> Spool:
    """Return the body of an answer; ValueError: it is not what was paid for."""
    return _copied(place, key, expected, ValueError("its body is damaged"))


def _copied(place: ImageStore, key: str, expected: StoredImage | Kept, wrong: ValueError) -> Spool:
    """Return an object's bytes; `wrong` is raised where they are not the expected ones."""
    spool = Spool()
    with place.open(place.uri(key)) as file:
        while spool.size_bytes <= expected.size_bytes and (chunk := file.read(_CHUNK)):
            spool.write(chunk)
    if (spool.sha256, spool.size_bytes) != (expected.sha256, expected.size_bytes):
        raise wrong
    return spool
