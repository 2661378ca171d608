"""What can be found in a store, and which of it is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final


class Kind(StrEnum):
    """The kinds of findings."""

    MISSING = "missing"
    WRONG_SIZE = "wrong-size"
    DAMAGED = "damaged"
    DEAD_CLAIM = "dead-claim"
    SENSELESS = "senseless"
    UNREADABLE = "unreadable"
    KEPT = "kept"
    ORPHAN = "orphan"
    HALF_WRITTEN = "half-written"
    UNKNOWN_OUTCOME = "unknown-outcome"
    PAST = "past"
    ROWLESS = "rowless"
    STRAY = "stray"


#: What each kind's findings are called together.
HEADINGS: Final = {
    Kind.MISSING: "records whose images are gone",
    Kind.WRONG_SIZE: "records whose images have another length",
    Kind.DAMAGED: "images whose bytes are not what their name says",
    Kind.DEAD_CLAIM: "claims that nobody renews",
    Kind.SENSELESS: "documents that make no sense",
    Kind.UNREADABLE: "objects that can't be read",
    Kind.KEPT: "answers that are paid for and can't be read",
    Kind.ORPHAN: "images that no record and no manifest names, and answers that no record names",
    Kind.HALF_WRITTEN: "half-written files that somebody left behind",
    Kind.UNKNOWN_OUTCOME: "requests of unknown outcome, perhaps paid for",
    Kind.PAST: "manifests of images that are gone by now",
    Kind.ROWLESS: "batches whose rows were an earlier one's, which is gone",
    Kind.STRAY: "objects that are not this package's",
}

#: The kinds that are good to know, and no reason to worry.
NOTES: Final = frozenset({Kind.UNKNOWN_OUTCOME, Kind.PAST, Kind.ROWLESS, Kind.STRAY})

#: Seconds after which nobody is still at work on a file that they wrote.
SETTLED: Final = 3600.0


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        kind: what it is about.
        uri: address of the record, image or file.
        message: what there is to say of it, in a line.
        images: keys of the images it is about.
        records: keys of the ledger's documents it is about.
        tag: of the document, where it must not change before it is put right.
        modified: when the file was written, Unix seconds, where its age matters.
        size_bytes: of that file.
    """

    kind: Kind
    uri: str
    message: str
    images: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    tag: str | None = None
    modified: float | None = None
    size_bytes: int = 0

    @property
    def wrong(self) -> bool:
        """Whether something is wrong, rather than only good to know."""
        return self.kind not in NOTES

    def as_json(self) -> dict[str, Any]:
        """Return the finding as JSON has it."""
        shown = ("kind", "wrong", "uri", "message", "images", "records")
        return {name: getattr(self, name) for name in shown}
