"""What a reading of a store notes: findings, and, in a database on disk, the images and who names them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, Final, Self

from prefect_ttapi.results import DeliveredImage
from prefect_ttapi.storage.objects import Listed


class Kind(StrEnum):
    """The kinds of findings, each with what its findings are called together."""

    heading: str

    def __new__(cls, name: str, heading: str) -> Self:
        """Make a kind whose value is its name."""
        kind = str.__new__(cls, name)
        kind._value_ = name
        kind.heading = heading
        return kind

    MISSING = "missing", "records whose images are gone"
    WRONG_SIZE = "wrong-size", "records whose images have another length"
    DAMAGED = "damaged", "images whose bytes are not what their name says"
    DEAD_CLAIM = "dead-claim", "claims that nobody renews"
    SENSELESS = "senseless", "documents that make no sense"
    UNREADABLE = "unreadable", "objects that can't be read"
    KEPT = "kept", "answers that are paid for and can't be read"
    ORPHAN = "orphan", "images that no record and no manifest names, and answers that no record names"
    HALF_WRITTEN = "half-written", "half-written files that somebody left behind"
    UNKNOWN_OUTCOME = "unknown-outcome", "requests of unknown outcome, perhaps paid for"
    COPY_GONE = "copy-gone", "delivered copies that are gone"
    COPY_CHANGED = "copy-changed", "delivered copies whose bytes are not those that were delivered"
    PAST = "past", "manifests of images that are gone by now"
    ROWLESS = "rowless", "batches whose rows were an earlier one's, which is gone"
    STRAY = "stray", "objects that are not this package's"


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


#: A record of the ledger names an image with its length; a row of a manifest, by content only.
_TABLES: Final = """
create table images (key text primary key, size integer, modified real) without rowid;
create table named (key text, size integer, record text, manifest text, row integer);
create index named_keys on named (key);
create table copies (key text primary key, size integer, sha256 text, manifest text, written real) without rowid;
"""

_SUSPECTS: Final = """
create table suspects as select distinct named.key from named left join images using (key)
where images.key is null or (record is not null and images.size <> named.size)
"""

_BROKEN: Final = """
select record, named.key, named.size, images.size from named left join images using (key)
where record is not null and images.size is not named.size order by record
"""

_PAST: Final = """
select distinct manifest, row from named left join images using (key)
where manifest is not null and images.key is null order by manifest, row
"""

_UNNAMED: Final = """
select key, size, modified from images where not exists (select 1 from named where named.key = images.key)
"""


#: Batches write their manifests in order; the last one that delivered to a key is right about it.
_COPY: Final = """
insert into copies values (?, ?, ?, ?, ?) on conflict (key) do update
set size = excluded.size, sha256 = excluded.sha256, manifest = excluded.manifest, written = excluded.written
where excluded.written >= written
"""


class Inventory:
    """Listed images and the names that point to them. SQLite keeps both in a temporary file, gone with the object."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("", check_same_thread=False)
        self._base.executescript(_TABLES)

    def add(self, image: Listed) -> None:
        """Keep an image of a listing."""
        self._base.execute("insert into images values (?, ?, ?)", (image.key, image.size, image.modified))

    def name_by_record(self, record: str, key: str, size: int) -> None:
        """Note that a document of the ledger names an image of this length."""
        self._base.execute("insert into named values (?, ?, ?, null, null)", (key, size, record))

    def name_by_row(self, manifest: str, row: int, key: str) -> None:
        """Note that a row of a manifest, told by its address, names an image."""
        self._base.execute("insert into named values (?, null, null, ?, ?)", (key, manifest, row))

    def name_copy(self, key: str, copy: DeliveredImage, manifest: Listed) -> None:
        """Note what a batch delivered to a key, in place of what an earlier batch did."""
        self._base.execute(_COPY, (key, copy.size_bytes, copy.sha256, manifest.key, manifest.modified or 0.0))

    def copies(self) -> Iterator[str]:
        """Return the keys that batches delivered to."""
        return (key for (key,) in self._base.execute("select key from copies"))

    def copy(self, key: str) -> tuple[int | None, str, str]:
        """Return what was delivered to a key last: length, if known, digest, and the manifest's key."""
        query = "select size, sha256, manifest from copies where key = ?"
        size, sha256, manifest = self._base.execute(query, (key,)).fetchone()
        return size, sha256, manifest

    def suspects(self) -> Iterator[str]:
        """Return the keys that are named and were not listed, or not with that length; ask once."""
        self._base.execute(_SUSPECTS)
        return (key for (key,) in self._base.execute("select key from suspects"))

    def correct(self, key: str, size: int | None) -> None:
        """Note an image's length as it is by now; None where it is gone."""
        self._base.execute("delete from images where key = ?", (key,))
        if size is not None:
            self._base.execute("insert into images values (?, ?, null)", (key, size))

    def forget_names(self, key: str) -> None:
        """Say nothing of what names the image."""
        self._base.execute("delete from named where key = ?", (key,))

    def broken(self) -> Iterator[tuple[str, list[tuple[str, int, int | None]]]]:
        """Return each record whose images are not as it says: keys, recorded lengths, true lengths (None: gone)."""
        for record, rows in groupby(self._base.execute(_BROKEN), lambda row: row[0]):
            yield record, [row[1:] for row in rows]

    def past(self) -> Iterator[tuple[str, Iterator[int]]]:
        """Return each manifest that names images which are gone, with its rows that do."""
        for manifest, rows in groupby(self._base.execute(_PAST), lambda row: row[0]):
            yield manifest, (number for _, number in rows)

    def unnamed(self) -> Iterator[Listed]:
        """Return the images that nothing names."""
        return (Listed(key, size, "", modified) for key, size, modified in self._base.execute(_UNNAMED))

    def totals(self) -> tuple[int, int]:
        """Return the number of images, and of their bytes."""
        found = self._base.execute("select count(*), coalesce(sum(size), 0) from images").fetchone()
        return found[0], found[1]

    def keys(self) -> Iterator[str]:
        """Return the keys of all images."""
        return (key for (key,) in self._base.execute("select key from images"))

    def owners(self, key: str) -> list[str]:
        """Return the keys of the records that name an image."""
        query = "select distinct record from named where key = ? and record is not null order by record"
        return [record for (record,) in self._base.execute(query, (key,))]
