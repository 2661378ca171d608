"""What a place for objects must be able to do, whatever kind of place it is.

An object is bytes under a key. Its tag changes with every write, so that a write can be made conditional on
what was read: that is all the ledger needs to elect one payer among many machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import BinaryIO, Final, Protocol

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.layout import SIDECARS

#: Opens a new reader over an object's bytes, as often as wanted: a second attempt starts from the first byte.
Body = Callable[[], BinaryIO]

#: S3's limit on a key, in bytes.
LONGEST_KEY: Final = 1024

#: Seconds for which a read, or a write that may be repeated, is tried again while the store gives no answer.
PATIENCE: Final = 3.0


class ConflictError(StoreError):
    """A conditional write was refused: the object is not what the writer expected."""


class NoAnswerError(StoreError):
    """No answer that settles it (no connection, silence, 409, 429, 5xx): a write may have happened or not."""


class Condition(Enum):
    """What a write expects to find at its key; a tag expects exactly the object that has this tag."""

    ANYTHING = "anything"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Listed:
    """One object of a listing.

    Attributes:
        tag: the tag of its last write.
        modified: when that was, Unix seconds by the store's clock, which S3 keeps within 15 minutes of ours.
    """

    key: str
    size: int
    tag: str
    modified: float


@dataclass(frozen=True)
class Found:
    """An object as it stands: length in bytes, metadata, the tag of its last write, and when that was, Unix seconds."""

    size: int
    metadata: Mapping[str, str]
    tag: str
    modified: float | None = None


@dataclass(frozen=True)
class Facts:
    """What is kept beside an object's bytes; `metadata`, `disposition` and `acl` as S3 takes them."""

    media_type: str
    cache_control: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    disposition: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    acl: str | None = None
    storage_class: str | None = None

    @property
    def sha256(self) -> str | None:
        """Hex digest of the bytes, which images are kept with and documents are not."""
        return self.metadata.get("sha256")


class ObjectStore(Protocol):
    """A folder or a bucket's prefix. Keys are relative to it; every failure is a `StoreError` of one line."""

    def uri(self, key: str) -> str:
        """The object's address."""

    def key(self, uri: str) -> str:
        """The key of an address that `uri` gave. StoreError: it is not in this place."""

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Bytes and tag, or None where there is no such object."""

    def fetch(self, key: str) -> Body:
        """The object, at hand on this machine. ImageMissingError: there is none."""

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Length in bytes of each, side by side; None where there is no such object."""

    def digest(self, key: str) -> tuple[int, str] | None:
        """Length in bytes and hex SHA-256, read as a stream; None where there is no such object."""

    def look(self, key: str) -> Found | None:
        """Length, metadata and tag, or None where there is no such object."""

    def write(
        self,
        key: str,
        body: Body,
        facts: Facts,
        expected: Condition | str = Condition.ANYTHING,
        patience: float = PATIENCE,
    ) -> str:
        """Write all of it or nothing; the new tag.

        A write that expects something is tried once: who lost an answer reads back what became of it. Others
        are tried again for `patience` seconds while the store gives no answer.
        """

    def try_writing(self, facts: Facts) -> None:
        """See whether objects like this may be written, and leave nothing behind."""

    def room(self) -> int | None:
        """How many bytes more there is room for, by the disk's own account; None where nobody knows."""

    def copy(
        self, source: ObjectStore, source_key: str, key: str, facts: Facts, expected: Condition
    ) -> str | None:
        """Copy without the bytes passing through here; the new tag. None, and nothing done, where that can't be."""

    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is none to remove. The ledger never does this."""

    def list(self, prefix: str) -> Iterator[Listed]:
        """Every object whose key starts with `prefix`, in no particular order."""

    def half_written(self) -> Iterator[Listed]:
        """What writers that were killed left behind, or others are still at work on: no objects yet."""

    def delete_half_written(self, key: str) -> None:
        """Remove what `half_written` listed under this key."""

    def presign(self, key: str, seconds: int) -> str:
        """An address that lets anyone read the object for `seconds`."""


def checked_key(key: str) -> str:
    """`key`, if it stays inside its store on every kind of store.

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
    """Whether a local folder keeps its own files (locks, half-written objects, metadata) under this name."""
    return name in (".lock", SIDECARS) or name.startswith(".tmp-")
