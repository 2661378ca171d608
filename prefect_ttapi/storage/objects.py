"""The interface of folders and buckets, the keys that both can have, and the check that a store keeps its promises.

An object is bytes under a key. Its tag changes with every write, so that a write can be made conditional on
what was read: that is all the ledger needs to elect one payer among many machines.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, Protocol, TypeVar
from urllib.parse import quote, unquote

from prefect_ttapi.errors import StoreError
from prefect_ttapi.images.spool import Body
from prefect_ttapi.stopping import Stop, backoff
from prefect_ttapi.storage.layout import PROBE, SIDECARS

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: S3's limit on a key, in bytes.
LONGEST_KEY: Final = 1024

#: Seconds for which a store that gives no answer is asked again, where nobody waits longer, and the pauses in between.
_PATIENCE: Final = 3.0
_PAUSES: Final = (0.1, 5.0)
_WORTH_TELLING: Final = 0.3

#: S3's limit on the names and values of one object, in bytes.
MOST_METADATA: Final = 2048

#: Printable ASCII without the percent sign, which is what marks an encoded byte.
_PLAIN: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%") + " "

#: How many objects are looked at side by side.
_SIDE_BY_SIDE: Final = 16

#: Of many processes that ask at the same moment each write lets one through, the others come again.
_ATTEMPTS: Final = 60
_LONGEST_PAUSE: Final = 0.2  # seconds


class ConflictError(StoreError):
    """A conditional write was refused: the object is not what the writer expected."""


class GoneError(ConflictError):
    """There is no such object."""


class NoAnswerError(StoreError):
    """No answer settles it (no connection, silence, 409, 429, 5xx): a write may have happened or not."""


class NoConditionsError(StoreError):
    """The store did not take a write because it has a condition, or so it seems: nothing was written."""


@dataclass(frozen=True)
class Patience:
    """The patience with a store that gives no answer.

    Attributes:
        seconds: from the first try to the last.
        stop: ends the wait sooner.
    """

    seconds: float = _PATIENCE
    stop: Stop = field(default_factory=Stop)

    def ask(self, call: Callable[[], Answer]) -> Answer:
        """Return what `call` gives, called again while the store gives no answer.

        Raises:
            NoAnswerError: nor did it in time.
            StopSending: the wait was stopped.
        """
        started, told = time.monotonic(), False
        for pause in backoff(*_PAUSES):
            try:
                return call()
            except NoAnswerError as error:
                waited = time.monotonic() - started
                if waited + pause > self.seconds:
                    raise
                if pause > _WORTH_TELLING and self.seconds > _PATIENCE and not told:
                    logger.warning("%s; asked again for %.0f s", error, self.seconds)
                    told = True
            # many that were turned away together don't come back together
            if self.stop.wait(pause * random.uniform(0.5, 1)):  # noqa: S311 - chance, not secrecy
                self.stop.check()
        raise AssertionError("pauses have no end")


_patience: ContextVar[Patience] = ContextVar("patience", default=Patience())  # noqa: B039 - its stop is nobody's


def patience() -> Patience:
    """Return how patient this thread is with stores."""
    return _patience.get()


@contextmanager
def waiting(seconds: float, stop: Stop | None = None) -> Iterator[None]:
    """Let this thread ask stores for so long within the block; without `stop`, the stop of an outer block counts."""
    before = _patience.set(Patience(seconds, stop or patience().stop))
    try:
        yield
    finally:
        _patience.reset(before)


def sha256_of(body: Body) -> str:
    """Return the hex digest of an object's bytes."""
    with body() as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()  # type: ignore[arg-type]


class Condition(Enum):
    """The state that a write expects at its key; a tag, as text, expects exactly the object that has it."""

    ANYTHING = "anything"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)  # there may be 200,000 of them
class Listed:
    """One object of a listing.

    Attributes:
        tag: the tag of its last write; empty where the listing doesn't tell.
        modified: when that was, Unix seconds by the store's clock, which S3 keeps within 15 minutes of ours; None
            where the listing doesn't tell.
    """

    key: str
    size: int
    tag: str
    modified: float | None


@dataclass(frozen=True)
class Found:
    """An object as it stands: length in bytes, metadata, the tag of its last write, and when that was, Unix seconds."""

    size: int
    metadata: Mapping[str, str]
    tag: str
    modified: float | None = None


@dataclass(frozen=True)
class Facts:
    """The facts that are kept beside an object's bytes; `metadata`, `disposition` and `acl` as S3 takes them."""

    media_type: str
    cache_control: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    disposition: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    acl: str | None = None
    storage_class: str | None = None

    @property
    def sha256(self) -> str | None:
        """Return the hex digest of the bytes, which is kept with images and not with documents."""
        return self.metadata.get("sha256")


class ObjectStore(Protocol):
    """A folder or a bucket's prefix. Keys are relative to it; every failure is a `StoreError` of one line."""

    def uri(self, key: str) -> str:
        """Return the object's address."""

    def key(self, uri: str) -> str:
        """Return the key of an address that `uri` gave.

        Raises:
            StoreError: it is not in this place.
        """

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return bytes and tag, or None where there is no such object."""

    def fetch(self, key: str) -> Body:
        """Bring the object to this machine; return a function that opens it.

        Raises:
            ImageMissingError: there is none.
        """

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Return the length in bytes of each, looked at side by side; None where there is no such object."""
        if len(keys) < 2:
            return list(map(self._size, keys))
        with ThreadPoolExecutor(min(len(keys), _SIDE_BY_SIDE)) as threads:
            patient = [copy_context() for _ in keys]
            return list(threads.map(lambda there, key: there.run(self._size, key), patient, keys))

    def _size(self, key: str) -> int | None:
        found = self.look(key)
        return found.size if found else None

    def digest(self, key: str) -> tuple[int, str] | None:
        """Return length in bytes and hex SHA-256, read as a stream; None where there is no such object."""

    def look(self, key: str) -> Found | None:
        """Return length, metadata and tag, or None where there is no such object."""

    def write(
        self, key: str, body: Body, facts: Facts, expected: Condition | str = Condition.ANYTHING
    ) -> str:
        """Write all of it or nothing; return the new tag.

        A write that expects something is tried once: who lost an answer reads back what became of it.

        Raises:
            NoConditionsError: the store takes no writes that expect something.
        """

    def put_tags(self, key: str, facts: Facts) -> None:
        """Give an object its tags, if the store has tags."""
        del key, facts

    def room(self) -> int | None:
        """Return how many more bytes there is room for, according to the disk; None if that is not known."""
        return None

    def copy(self, source: ObjectStore, source_key: str, key: str, facts: Facts, expected: Condition) -> bool:
        """Copy without the bytes passing through here; return whether that could be done."""
        del source, source_key, key, facts, expected
        return False

    def delete(self, key: str) -> None:
        """Remove the object, if it is there. The ledger never does this."""

    def list(self, prefix: str) -> Iterator[Listed]:
        """Yield every object whose key starts with `prefix`, in no particular order."""

    def half_written(self) -> Iterator[Listed]:
        """Yield files that killed writers left behind, or others are still writing: no objects yet."""
        return iter(())

    def delete_half_written(self, key: str) -> None:
        """Remove a file that `half_written` listed under this key."""
        raise StoreError(f"there are no half-written objects here: {key}")

    def presign(self, key: str, seconds: int) -> str:
        """Return an address that lets anyone read the object for `seconds`."""


def checked_key(key: str) -> str:
    """Return `key`, if it stays inside its store on every kind of store.

    >>> checked_key("images/a.png")
    'images/a.png'

    Raises:
        StoreError: empty, longer than 1,024 bytes, absolute, with `..`, `.` or empty segments, backslashes or
            control characters, or a name that local folders reserve (`.lock`, `.metadata`, `.tmp-...`).
    """
    wrong = _what_is_wrong(key)
    if wrong:
        raise StoreError(f"the key {key[:80]!a} can't be used: {wrong}")
    return key


def _what_is_wrong(key: str) -> str | None:
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        return "it holds a lone surrogate, which is no character"
    segments = key.split("/")
    checks = (
        (not key, "it is empty"),
        (length > LONGEST_KEY, f"it is longer than {LONGEST_KEY:,} bytes"),
        (key.startswith("/"), "it is absolute"),
        (not key.isprintable() or "\\" in key, "it holds a control character or a backslash"),
        (any(segment in ("", ".", "..") for segment in segments), "it has an empty, '.' or '..' segment"),
        (any(reserved(segment) for segment in segments), "its name is reserved for the store's own files"),
    )
    return next((reason for failed, reason in checks if failed), None)


def reserved(name: str) -> bool:
    """Return whether a local folder keeps its own files (locks, half-written objects, metadata) under this name."""
    return name in (".lock", SIDECARS) or name.startswith(".tmp-")


class TakenKeys:
    """Keys with their owners, in some 200 bytes each, however long they are.

    A bucket could hold keys that differ in case only, or a key below another one; a folder on some systems could
    not. Keys must work in both.

    >>> taken = TakenKeys()
    >>> taken.take("a.png", "one", 0), taken.take("a.png", "one", 1)
    (None, None)
    >>> taken.take("A.png", "another", 2)
    'its key A.png is also that of another image, of request 0'
    """

    def __init__(self) -> None:
        self._owners: dict[bytes, tuple[int, bytes]] = {}
        self._folders: dict[bytes, int] = {}

    def take(self, key: str, image: str, row: int) -> str | None:
        """Take `key` for an image; return why it can't be had, or None. The same image may take it again."""
        path, owner = key.lower(), _digest(image)
        name, folders = _digest(path), [_digest(path[: slash.start()]) for slash in re.finditer("/", path)]
        if name in self._owners and self._owners[name][1] != owner:
            return f"its key {key} is also that of another image, of request {self._owners[name][0]}"
        if name in self._folders:
            return f"its key {key} is a folder in a key of request {self._folders[name]}"
        blocked = next((folder for folder in folders if folder in self._owners), None)
        if blocked is not None:
            return f"its key {key} needs a folder where request {self._owners[blocked][0]} has an image"
        self._owners.setdefault(name, (row, owner))
        for folder in folders:
            self._folders.setdefault(folder, row)
        return None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def ascii_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return `metadata` as S3 takes it: lower-case names with dashes, values percent-encoded where they must be.

    The longest values are cut where all of it is more than 2,048 bytes: what was paid for is not lost over a
    label.

    >>> ascii_metadata({"request_hash": "ab", "prompt": "Zoë, 100 %"})
    {'request-hash': 'ab', 'prompt': 'Zo%C3%AB, 100 %25'}
    """
    encoded = {re.sub(r"[^a-z0-9-]", "-", name.lower()): _encoded(value) for name, value in metadata.items()}
    names = sum(map(len, encoded))
    longest = max(map(len, encoded.values()), default=0)
    while names + sum(len(value[:longest]) for value in encoded.values()) > MOST_METADATA and longest:
        longest -= 16
    return {name: _cut(value, longest) for name, value in encoded.items()}


def read_metadata(value: str) -> str:
    """Return the text that `ascii_metadata` encoded.

    >>> read_metadata("Zo%C3%AB, 100 %25")
    'Zoë, 100 %'
    """
    return unquote(value, errors="replace")


def _encoded(value: str) -> str:
    encoded = quote(value, safe=_PLAIN, errors="replace")
    # S3 trims spaces at either end
    if not (body := encoded.strip(" ")):
        return "%20" * len(encoded)
    before, _, after = encoded.partition(body)
    return "%20" * len(before) + body + "%20" * len(after)


def _cut(value: str, length: int) -> str:
    """Return at most `length` characters of an encoded value, and no character cut in two."""
    if len(value) <= length:
        return value
    whole_escapes = re.sub(r"%[0-9A-F]?$", "", value[: max(length, 0)])
    return _encoded(unquote(whole_escapes, errors="ignore").rstrip(" "))


def probe(objects: ObjectStore, facts: Facts) -> None:
    """Replace a small object as a ledger does, then see a second create and a write with a stale tag refused.

    A store that ignores conditions says yes to both, and would let two machines pay for the same request. The object
    stays: without it a check by one process would look like a broken promise to another.

    Args:
        facts: what images are kept with, so that what the store doesn't take is known before one is paid for.

    Raises:
        StoreError: the store can't be read or written, or takes no heed of conditions.
    """
    try:
        stale = _replace(objects, facts)
        for expected, why in (
            (Condition.NOTHING, "it creates an object twice"),
            (stale, "it ignores If-Match"),
        ):
            _check_refused(objects, expected, why)
    except NoConditionsError as error:
        _write(objects, Condition.ANYTHING, facts)  # or does it refuse something else?
        raise StoreError(
            f"{objects.uri(PROBE)}: this store has no conditional writes ({error}), so that two machines could pay for "
            "one request; use one that has them (AWS S3, Cloudflare R2, MinIO, Ceph, a folder on a local disk)"
        ) from error


def _check_refused(objects: ObjectStore, expected: Condition | str, why: str) -> None:
    with suppress(ConflictError):
        _write(objects, expected)
        raise NoConditionsError(why)


def _replace(objects: ObjectStore, facts: Facts) -> str:
    """Replace the probe object, made where there is none; return a tag that it no longer has."""
    for _ in range(_ATTEMPTS):
        found = objects.read(PROBE)
        try:
            tag = found[1] if found else _write(objects, Condition.NOTHING)
            _write(objects, tag, facts)
        except ConflictError:
            # another process is asking the same
            time.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311 - chance, not secrecy
        else:
            return tag
    raise StoreError(
        f"{objects.uri(PROBE)}: this store refuses conditional writes that are as expected; use another store"
    )


def _write(objects: ObjectStore, expected: Condition | str, facts: Facts | None = None) -> str:
    """Write something new; return its tag. Without an answer it is tried again, since it may be written twice."""
    document = b'{"probe": "%s"}' % secrets.token_hex(16).encode()
    said = Facts("application/json")
    if facts:
        said = replace(facts, metadata={**facts.metadata, "sha256": hashlib.sha256(document).hexdigest()})
    return patience().ask(lambda: objects.write(PROBE, lambda: io.BytesIO(document), said, expected))
