"""Answers that are paid for and that their store would not take: kept on this machine until it does.

Each is a small image store of its own, at `<rescue folder>/<API origin>/<store>/<request hash>`: the images, and the
ledger's record of them, which is written last. So an answer is there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.headers import ImageFacts, read_image
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.ledger.documents import (
    Answer,
    Document,
    Documents,
    Record,
    State,
    decode,
    encode,
    record_of,
)
from prefect_ttapi.results import GeneratedImage, StoredImage
from prefect_ttapi.storage.layout import image_key, slug_of
from prefect_ttapi.storage.objects import Facts
from prefect_ttapi.storage.store import ImageStore

_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True)
class Rescued:
    """An answer from the folder, found to be whole: what to record, what that says, and the images' bytes."""

    answer: Answer
    record: Record
    images: tuple[GeneratedImage, ...]


class Rescue:
    """The answers of one API that wait for one store.

    Only folders of this user that nobody else may write to are trusted, and only as far as every image has the
    SHA-256, type and size that its record names.
    """

    def __init__(self, store: ImageStore, api_origin: str, log: logging.Logger | logging.LoggerAdapter[Any]):
        self._store = store
        self._api_origin = api_origin
        self._log = log

    def folder(self, request_hash: str) -> Path:
        """Where the answer to a request is kept. StoreError: this user has no home, and no folder is set."""
        return (
            _root(self._store.rescue_folder) / slug_of(self._api_origin) / _named(self._store) / request_hash
        )

    def holds(self, request_hash: str) -> bool:
        """Whether there is something for this request, whole or not. Where one may not even look: no, and a warning."""
        try:
            return self.folder(request_hash).is_dir()
        except StoreError:
            return False
        except OSError as error:
            self._log.warning("what may be in the rescue folder is not looked for: %s", error)
            return False

    def put(self, request_hash: str, answer: Answer, images: tuple[GeneratedImage, ...]) -> None:
        """Keep an answer, in the place of an older one to the same request.

        Raises:
            StoreError: the folder can't be written.
        """
        folder = self.folder(request_hash)
        _make_private(folder)
        place = ImageStore(url=str(folder))
        for image in images:
            # also where there is something: it may be damaged
            key = image_key(image.sha256, image.media_type)
            place.objects.write(key, image.open, Facts(image.media_type))
        document = Document(
            request_hash=request_hash,
            api_origin=self._api_origin,
            state=State.GENERATED,
            token=answer.token,
            sequence=0,
            answer=answer,
        )
        place.write(
            Documents(place, self._api_origin).key(request_hash), encode(document), "application/json"
        )

    def take(self, request_hash: str) -> Rescued | None:
        """The answer to a request; None where there is none, or one that is damaged, which the log says.

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
            self._log.warning("%s is passed over: %s; look, and delete it", folder, error)
            return None

    def remove(self, request_hash: str) -> None:
        """Forget an answer, or what there is of it: the store has it."""
        if not self.holds(request_hash):
            return
        folder = self.folder(request_hash)
        place = ImageStore(url=str(folder))
        try:
            place.objects.delete(
                Documents(place, self._api_origin).key(request_hash)
            )  # first: whole or not at all
        except StoreError as error:
            self._log.warning("what the store has is left in the rescue folder: %s", error)
        shutil.rmtree(folder, ignore_errors=True)

    def _read(self, folder: Path, request_hash: str) -> Rescued | None:
        _check_owner(folder)
        place = ImageStore(url=str(folder))
        data = place.read(Documents(place, self._api_origin).key(request_hash))
        if data is None:
            raise ValueError("it was not finished, or is being removed")
        document = decode(data, request_hash, self._api_origin)
        record = record_of(document, self._store)
        if record is None or document.answer is None:
            raise ValueError("it names no images")
        images = tuple(_read_image(place, image) for image in record.generation.images)
        return Rescued(document.answer, record, images)


def _root(rescue_folder: str | None) -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        if rescue_folder:
            return Path(rescue_folder).expanduser().absolute()
        # as its specification wants: a relative path doesn't count
        home = Path(state) if Path(state).is_absolute() else Path("~/.local/state").expanduser()
    except RuntimeError as error:
        raise StoreError(
            f"there is no place for a rescue folder ({error}): set the store's rescue_folder"
        ) from None
    return home / "prefect-ttapi" / "rescue"


def _named(store: ImageStore) -> str:
    """A folder's name for a store: for people its address, and a digest that no two stores share."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", store.identity).strip("-")[-80:]
    return f"{readable}-{hashlib.sha256(store.identity.encode()).hexdigest()[:16]}"


def _make_private(folder: Path) -> None:
    """Make the folder, and the two above it that are the package's own, for this user only."""
    try:
        for part in (*reversed(folder.parents[:2]), folder):
            part.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"can't make {folder}: {error.strerror}") from error


def _check_owner(folder: Path) -> None:
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        raise ValueError("it is not this user's")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError("others may write to it")


def _read_image(place: ImageStore, expected: StoredImage) -> GeneratedImage:
    """An image's bytes, copied out; ValueError: they are not those that were paid for."""
    spool = Spool()
    with place.open(place.uri(image_key(expected.sha256, expected.media_type))) as file:
        while spool.size_bytes <= expected.size_bytes and (chunk := file.read(_CHUNK)):
            spool.write(chunk)
    facts = ImageFacts(expected.media_type, expected.width, expected.height)
    intact = (spool.sha256, spool.size_bytes) == (expected.sha256, expected.size_bytes)
    if not intact or read_image(spool) != facts:
        raise ValueError(f"its image {expected.index} is damaged")
    return GeneratedImage(
        spool=spool,
        media_type=expected.media_type,
        width=expected.width,
        height=expected.height,
        index=expected.index,
        revised_prompt=expected.revised_prompt,
    )
