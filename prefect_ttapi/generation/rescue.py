"""The rescue folder, where this machine keeps paid answers that a store does not take.

What it has of a request is a small image store of its own, at
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
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.headers import ImageFacts, read_image
from prefect_ttapi.images.spool import Spool
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
from prefect_ttapi.results import GeneratedImage, StoredImage
from prefect_ttapi.storage.layout import answer_key, image_key, is_sha256, ledger_key, slug_of
from prefect_ttapi.storage.objects import Facts
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: The body of an answer is somebody else's text, which no browser should take for a page of whoever owns the bucket.
UNREAD: Final = Facts("application/octet-stream")

_CHUNK: Final = 1024 * 1024

#: Rescue folders that this process has found to be writable.
_writable: set[Path] = set()


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
class RescueFolder:
    """Answers of one API that wait on this machine for one store.

    Only folders of this user that nobody else may write to are trusted, and only as far as every image, and every body
    of an answer, has the SHA-256, type and size that its record names.
    """

    store: ImageStore
    api_origin: str
    log: Log

    def requests(self) -> Iterator[str]:
        """Yield the requests that have something here, whole or not.

        Raises:
            StoreError: the folder can't be read.
        """
        for place in _trusted(self.store.rescue_folder):
            folder = place / self._below
            try:
                yield from (found.name for found in sorted(folder.glob("*")) if is_sha256(found.name))
            except OSError as error:
                raise StoreError(f"can't read {folder}: {error.strerror}") from error

    def waiting(self) -> tuple[int, Path | None]:
        """Return how many answers wait here, and where; none where the folder can't be read."""
        try:
            found = [each for each in self.requests() if not self._is_under_way(each)]
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

    @property
    def _below(self) -> Path:
        identity = self.store.identity
        # for people the address, and a digest that no two stores share
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", identity).strip("-")[-80:]
        name = f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        return Path(slug_of(self.api_origin), name)

    def holds(self, request_hash: str) -> bool:
        """Return whether there is something for this request, whole or not."""
        return self._found(request_hash) is not None

    def folder(self, request_hash: str) -> Path:
        """Return where the answer to a request is kept, or would be. StoreError: it could be kept nowhere."""
        found = self._found(request_hash)
        return found or rescue_place(self.store.rescue_folder) / self._below / request_hash

    def _found(self, request_hash: str) -> Path | None:
        """Return where something is kept for this request; None, with a warning, where it can't be told."""
        try:
            places = _trusted(self.store.rescue_folder)
        except StoreError:
            return None
        for folder in (place / self._below / request_hash for place in places):
            try:
                if folder.is_dir():
                    return folder
            except OSError as error:  # there may be another that can be looked into
                self.log.warning("what may be in the rescue folder is not looked for: %s", error)
        return None

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
        objects = _store_in(folder).objects
        unread = hand.rest if isinstance(hand, Read) else hand
        if unread:
            objects.write(self.key_of_body(request_hash, unread.answer), unread.body.open, UNREAD)
        if isinstance(hand, Read):
            for image in hand.images:
                # also where there is something: it may be damaged
                key = image_key(image.sha256, image.media_type)
                objects.write(key, image.open, Facts(image.media_type))
            self._write(folder, request_hash, hand.answer, (unread.answer,) if unread else ())
        else:
            standing = self._standing(folder, request_hash)
            answer, others = (
                (standing.answer, _others(standing, hand.answer.token)) if standing else (None, ())
            )
            self._write(folder, request_hash, answer, (*others, hand.answer))

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

    def is_stored(self, record: Record) -> bool:
        """Return whether a standing record has all that is here of its request.

        Raises:
            StoreError: it can't be read now.
        """
        made = record.generation
        rescued = self.take(made.request_hash)
        if rescued is None or any(hand.answer.when > made.created_at for hand in rescued.unread):
            return False
        return rescued.record is None or rescued.record.generation.created_at == made.created_at

    def forget(self, record: Record) -> None:
        """Remove what is here of a standing record: whoever stored it had no time to."""
        try:
            if self.is_stored(record):
                self.remove(record.generation.request_hash)
        except StoreError as error:
            self._stays(error)

    def remove(self, request_hash: str) -> None:
        """Remove all there is of a request, which the store has."""
        if (folder := self._found(request_hash)) is None:
            return
        try:
            # first: whole or not at all
            _store_in(folder).remove(self._key(request_hash))
        except StoreError as error:
            self._stays(error)
        shutil.rmtree(folder, ignore_errors=True)

    def remove_unread(self, request_hash: str, token: str) -> None:
        """Remove one answer that was kept unread, if it is here: the store has it, or what it says."""
        if (folder := self._found(request_hash)) is None:
            return
        try:
            standing = self._standing(folder, request_hash)
            others = _others(standing, token) if standing else ()
            if standing is None or others == standing.kept:
                return
            if others or standing.answer:
                self._write(folder, request_hash, standing.answer, others)
                _store_in(folder).remove(answer_key(slug_of(self.api_origin), request_hash, token))
            else:
                self.remove(request_hash)
        except StoreError as error:
            self._stays(error)

    def key_of_body(self, request_hash: str, answer: Answer) -> str:
        """Return the key of an answer as it came, here and in the store."""
        return answer_key(slug_of(self.api_origin), request_hash, answer.token)

    def _key(self, request_hash: str) -> str:
        return ledger_key(slug_of(self.api_origin), request_hash)

    def _stays(self, error: StoreError) -> None:
        self.log.warning("what the store has is left in the rescue folder: %s", error)

    def _write(self, folder: Path, request_hash: str, answer: Answer | None, kept: tuple[Kept, ...]) -> None:
        document = Document(
            request_hash=request_hash,
            api_origin=self.api_origin,
            state=State.GENERATED if answer else State.UNKNOWN,
            token=secrets.token_hex(16),
            sequence=0,
            answer=answer,
            kept=kept,
        )
        _store_in(folder).write(self._key(request_hash), encode(document), "application/json")

    def _document(self, folder: Path, request_hash: str) -> Document:
        """Return what a folder says it has. ValueError: it is not to be trusted, or was not finished."""
        if (why := _why_not_ours(folder)) is not None:
            raise ValueError(why)
        data = _store_in(folder).read(self._key(request_hash))
        if data is None:
            raise ValueError("it was not finished, or is being removed")
        return decode(data, request_hash, self.api_origin)

    def _standing(self, folder: Path, request_hash: str) -> Document | None:
        try:
            return self._document(folder, request_hash)
        except (ValueError, OSError):
            return None

    def _read(self, folder: Path, request_hash: str) -> Rescued:
        document, place = self._document(folder, request_hash), _store_in(folder)
        unread = tuple(
            Unread(kept, bytes_in(place, self.key_of_body(request_hash, kept), kept, "its body"))
            for kept in document.kept
        )
        record, read = record_of(document, self.store), None
        if record is not None and document.answer is not None:
            images = tuple(image_in(place, image) for image in record.generation.images)
            rest = next((hand for hand in unread if hand.answer.token == document.answer.token), None)
            read = Read(document.answer, images, rest)
        if read is None and not unread:
            raise ValueError("it names no images")
        return Rescued(read, record, unread)


def _store_in(folder: Path) -> ImageStore:
    return ImageStore(url=str(folder))


def _others(standing: Document, token: str) -> tuple[Kept, ...]:
    return tuple(kept for kept in standing.kept if kept.token != token)


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


def image_in(place: ImageStore, expected: StoredImage) -> GeneratedImage:
    """Return an image with its bytes, copied out; ValueError: they are not those that were paid for."""
    what = f"its image {expected.index}"
    spool = bytes_in(place, image_key(expected.sha256, expected.media_type), expected, what)
    if read_image(spool) != ImageFacts(expected.media_type, expected.width, expected.height):
        raise ValueError(f"{what} is damaged")
    known = expected.model_dump(include={"media_type", "width", "height", "index", "revised_prompt"})
    return GeneratedImage(spool, **known)


def bytes_in(place: ImageStore, key: str, expected: StoredImage | Kept, what: str) -> Spool:
    """Return an object's bytes, copied out; ValueError: they are not those that were paid for."""
    spool = Spool()
    with place.open(place.uri(key)) as file:
        while spool.size_bytes <= expected.size_bytes and (chunk := file.read(_CHUNK)):
            spool.write(chunk)
    if (spool.sha256, spool.size_bytes) != (expected.sha256, expected.size_bytes):
        raise ValueError(f"{what} is damaged")
    return spool
