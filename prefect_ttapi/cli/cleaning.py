"""The command `gc`: what a store holds that nobody needs, shown before it is deleted."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby
from typing import Final

from rich.filesize import decimal
from rich.prompt import Confirm

from prefect_ttapi.cli.batches import Batch, batches_of
from prefect_ttapi.cli.checks import unneeded
from prefect_ttapi.cli.findings import SETTLED, Finding
from prefect_ttapi.cli.reporting import Loudness, Progress, complain, loudness, say
from prefect_ttapi.cli.stores import standing_store
from prefect_ttapi.cli.verify import repair
from prefect_ttapi.generation.rescue import RescueFolder
from prefect_ttapi.ledger.documents import Documents
from prefect_ttapi.lineage.report import Unchanged
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.origins import DEFAULT_BASE_URL, SANDBOX_ORIGIN
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Things of each kind that are named, without --verbose.
SHOWN: Final = 5


@dataclass(frozen=True)
class Waste:
    """Something that nobody needs.

    Attributes:
        kind: what it is, in words.
        where: its address.
        size_bytes: its length.
        delete: deletes it, unless that is wrong by now; returns whether it is gone.
    """

    kind: str
    where: str
    size_bytes: int
    delete: Callable[[], bool]


def run(
    address: str, endpoint_url: str | None, older_than: str | None, keep: int | None, *, yes: bool
) -> int:
    """Show what nobody needs, and delete it if that is wanted; return 1 where something could not be deleted."""
    age = _age(older_than)
    store, progress = standing_store(address, endpoint_url), Progress(sys.stderr)
    found = [*_batches(store, age, keep), *_unnamed(store, progress), *_rescued(store)]
    progress.clear()
    if not found:
        say(f"{store.identity} holds nothing that is not needed.")
        return 0
    _show(found)
    if not yes and not (sys.stdin.isatty() and Confirm.ask("Delete all of it?", default=False)):
        say("Nothing was deleted: --yes deletes without asking.")
        return 0
    gone = [each for each in progress.count("deleting", found) if each.delete()]
    progress.clear()
    say(f"Deleted: {counted(len(gone), 'thing')}, {decimal(sum(each.size_bytes for each in gone))}.")
    left = len(found) - len(gone)
    if left:
        complain(f"{counted(left, 'thing')} could not be deleted, or may be needed by now: gc looks again")
    return 1 if left else 0


def _age(text: str | None) -> timedelta | None:
    """Return an age as `90d` or `12h` says it.

    >>> _age("90d").days
    90

    Raises:
        ValueError: it says none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})([dh])", text)
    if found is None:
        raise ValueError(f"--older-than {text} is written like 90d or 12h")
    return timedelta(**{{"d": "days", "h": "hours"}[found[2]]: int(found[1])})


def _batches(store: ImageStore, age: timedelta | None, keep: int | None) -> Iterator[Waste]:
    """Yield files of old batches, where it is said what is old; and parts whose rows a manifest has."""
    batches, now = batches_of(store), datetime.now(UTC)
    # both together: neither of the last ones, nor younger
    older = [] if age is None and keep is None else batches[keep or 0 :]
    old = {batch.folder for batch in older if age is None or now - batch.written > age}
    known = {batch.folder for batch in batches}
    needed = {batch.unchanged.same_as for batch in batches if batch.unchanged and batch.folder not in old}
    for batch in batches:
        if batch.folder in old & needed:
            say(f"The batch {batch.id} is old, and stays: later ones in which nothing changed refer to it.")
        elif batch.folder in old:
            # the manifest first: whoever refers to the batch just now looks for that
            for file in sorted(batch.files, key=lambda file: file.key != batch.manifest):
                delete = partial(_delete_of_old, store, batch, known, file.key)
                yield Waste("files of old batches", store.uri(file.key), file.size, delete)
        elif batch.manifest and now.timestamp() - batch.written.timestamp() > SETTLED:
            for part in batch.parts:
                delete = partial(_delete, store, part.key)
                yield Waste("parts of batches that ended", store.uri(part.key), part.size, delete)


def _delete(store: ImageStore, key: str) -> bool:
    store.remove(key)
    return True


def _delete_of_old(store: ImageStore, batch: Batch, known: set[str], key: str) -> bool:
    """Delete a file of an old batch, unless one that came since refers to the batch.

    Args:
        known: the folders of the batches that were there, none of which needs it.
    """
    # only the last ones of a name are referred to anew
    new = (layout.unchanged_in(listed.key) for listed in store.list(layout.BATCHES)) if batch.name else ()
    left = (Unchanged.read(store, folder) for folder in new if folder and folder not in known)
    if batch.folder in {each.same_as for each in left if each}:
        return False
    return _delete(store, key)


def _unnamed(store: ImageStore, progress: Progress) -> Iterator[Waste]:
    """Yield what no record and no manifest names, and what killed writers left behind."""
    for finding in unneeded(store, progress):
        if finding.modified is not None and time.time() - finding.modified > SETTLED:
            delete = partial(_delete_found, store, finding)
            yield Waste(finding.kind.heading, finding.uri, finding.size_bytes, delete)


def _delete_found(store: ImageStore, finding: Finding) -> bool:
    # which looks once more whether anything names it by now
    return repair(store, finding, delete_orphans=True).line.startswith("deleted")


def _rescued(store: ImageStore) -> Iterator[Waste]:
    """Yield what the rescue folder of this machine still has though the store has it; the rest is left."""
    waiting = 0
    for origin in (DEFAULT_BASE_URL, SANDBOX_ORIGIN):
        rescue, documents = RescueFolder(store, origin, logger), Documents(store, origin)
        for request_hash in rescue.requests():
            seen = documents.read(request_hash)
            record = documents.record(seen) if seen else None
            if record is None or store.missing(record.generation.images) or not rescue.is_stored(record):
                waiting += 1
                continue
            folder = rescue.folder(request_hash)
            length = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            delete = partial(_delete_rescued, rescue, request_hash)
            yield Waste("rescued answers that the store has", str(folder), length, delete)
    if waiting:
        told = f"{counted(waiting, 'answer')} in the rescue folder of this machine"
        say(f"{told}: the next run puts them into the store.")


def _delete_rescued(rescue: RescueFolder, request_hash: str) -> bool:
    rescue.remove(request_hash)
    return not rescue.holds(request_hash)


def _show(found: Sequence[Waste]) -> None:
    ordered = sorted(found, key=lambda each: each.kind)
    most = None if loudness() is Loudness.VERBOSE else SHOWN
    for kind, group in groupby(ordered, key=lambda each: each.kind):
        each = list(group)
        say(f"{kind[0].upper()}{kind[1:]}: {len(each):,}, {decimal(sum(one.size_bytes for one in each))}")
        say(*(f"  {one.where}" for one in each[:most]))
        if most and len(each) > most:
            say(f"  and {len(each) - most:,} more; --verbose shows all")
