"""The command `verify`: read a whole store, say what is wrong, put right what surely can be.

What is put right is put right one step at a time, each only if what was found still stands.

A right-sized image with wrong bytes would stay for ever: whoever stores the same image sees its length and writes
nothing. So it is deleted, and the records that name it are released: the next run pays for them anew. In between, a
record without its images counts as never generated. An answer that nobody can read is struck off its record, so that
the next run pays anew; its body stays for whoever wants to look at it, as an orphan.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefect_ttapi.cli.arguments import Verifying
from prefect_ttapi.cli.checks import (
    COPIES,
    IMAGES,
    LEDGER,
    LISTING,
    MANIFESTS,
    keeps,
    names,
    standing,
    verify,
)
from prefect_ttapi.cli.findings import SETTLED, Finding, Kind
from prefect_ttapi.cli.reporting import Progress
from prefect_ttapi.cli.stores import store_at
from prefect_ttapi.errors import StoreError
from prefect_ttapi.ledger.documents import Document, Documents, Seen, State, payment
from prefect_ttapi.ledger.transitions import facts_of, replaced, resting
from prefect_ttapi.origins import DEFAULT_BASE_URL, SANDBOX_ORIGIN
from prefect_ttapi.storage.layout import answer_in, document_in, ledger_key, slug_of
from prefect_ttapi.storage.store import ImageStore

#: Findings of each kind that are shown; --json has all.
SHOWN: Final = 10

#: The totals, and the kinds of work that they count.
_TOTALS: Final = {"records": LEDGER, "images": LISTING, "images_read": IMAGES, "manifest_rows": MANIFESTS}


def run(address: str, asked: Verifying) -> int:
    """Verify, and repair where asked to; return the exit status."""
    if asked.delete_orphans and not asked.repair:
        raise ValueError("--delete-orphans needs --repair")
    progress = Progress(sys.stderr)
    shown = _Shown(as_json=asked.json)
    try:
        store = store_at(address, asked.endpoint_url)
        delivered = store_at(asked.delivered, asked.endpoint_url) if asked.delivered else None
        for finding in verify(store, quick=asked.quick, delivered=delivered, progress=progress):
            mend = asked.repair and finding.wrong
            done = repair(store, finding, delete_orphans=asked.delete_orphans) if mend else None
            progress.clear()
            shown.add(finding, done)
    except sqlite3.Error as error:
        raise OSError(f"there is no room for temporary files: {error}") from error
    finally:
        progress.clear()
    counted = _TOTALS | ({"copies_read": COPIES} if delivered else {})
    totals = {name: progress.done.get(doing, 0) for name, doing in counted.items()}
    for line in shown.summary(store.identity, totals):
        print(line)
    return 1 if shown.wrong else 0


class _Shown:
    """Prints findings, and remembers no more of them than it will show."""

    def __init__(self, *, as_json: bool) -> None:
        self.wrong = 0
        self._as_json = as_json
        self._counts: Counter[Kind] = Counter()
        self._repaired = 0
        self._first: dict[Kind, list[str]] = {}

    def add(self, finding: Finding, done: Repair | None) -> None:
        self._counts[finding.kind] += 1
        repaired = done is not None and done.done
        self._repaired += repaired
        self.wrong += finding.wrong and not repaired
        if self._as_json:
            what = {"repair": done.line, "repaired": done.done} if done else {}
            print(json.dumps(finding.as_json() | what))
            return
        if done:
            print(f"{finding.kind}: {done.line}")
        first = self._first.setdefault(finding.kind, [])
        if len(first) < SHOWN:
            first.append(f"  {finding.uri}: {finding.message}")

    def summary(self, store: str, totals: dict[str, int]) -> Iterator[str]:
        if self._as_json:
            what = {"findings": self._counts, "wrong": self.wrong, "repaired": self._repaired}
            yield json.dumps({"kind": "summary", "store": store} | what | totals)
            return
        for kind in (kind for kind in Kind if self._counts[kind]):
            yield f"{kind.heading}: {self._counts[kind]:,}"
            yield from self._first[kind]
            if self._counts[kind] > SHOWN:
                yield f"  and {self._counts[kind] - SHOWN:,} more; --json has all"
        counted = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in totals.items())
        repaired = f", {self._repaired:,} put right" if self._repaired else ""
        verdict = f"{self.wrong:,} wrong" if self.wrong else "all is well"
        yield f"{store}: {counted}: {verdict}{repaired}"


#: Why nothing is done about other findings.
_LEFT: Final = {
    Kind.COPY_GONE: "left: the next run of its batch delivers it again",
    Kind.COPY_CHANGED: "left: delete it, or run its batch with --overwrite, and it is delivered again",
    Kind.ORPHAN: "left: only --delete-orphans deletes it",
    Kind.HALF_WRITTEN: "left: only --delete-orphans deletes it",
    Kind.SENSELESS: "left: look at it yourself, and delete it if the request may be paid for anew",
    Kind.UNREADABLE: "left: find out why it can't be read",
}


@dataclass(frozen=True)
class Repair:
    """The end of a finding: whether it is put right, and a line about it."""

    done: bool
    line: str


def repair(store: ImageStore, finding: Finding, *, delete_orphans: bool = False) -> Repair:
    """Put right what was found, or say why not.

    Args:
        delete_orphans: delete what nothing names, too: orphans, and half-written files.

    Raises:
        StoreError: the store can't keep the ledger's promises; nothing was written.
    """
    store.check_once()
    try:
        match finding.kind:
            case Kind.MISSING | Kind.WRONG_SIZE | Kind.DAMAGED:
                return _heal(store, finding)
            case Kind.DEAD_CLAIM:
                return _end_claim(store, finding)
            case Kind.KEPT:
                return _give_up_answers(store, finding)
            case Kind.ORPHAN if delete_orphans:
                return _delete_image(store, finding)
            case Kind.HALF_WRITTEN if delete_orphans:
                return _delete(store, finding)
    except StoreError as error:
        return Repair(False, f"not put right: {error}")
    return Repair(False, _LEFT.get(finding.kind, "left as it is"))


def _heal(store: ImageStore, finding: Finding) -> Repair:
    """Delete images that are not what their name says, and release the records that lack images."""
    digests = {key: store.objects.digest(key) for key in finding.images}
    deleted = [key for key, found in digests.items() if found and f"/{found[1]}." not in key]
    for key in deleted:
        store.remove(key)
    released = [_release(store, key) for key in finding.records]
    lines = [f"deleted {key}" for key in deleted] + [step.line for step in released]
    return Repair(all(step.done for step in released), "; ".join(lines) or "left: its bytes are right now")


def _release(store: ImageStore, key: str) -> Repair:
    """Say of a record whose images are not all there that nothing was generated; what was paid stays noted."""
    documents, seen, record = standing(store, key)
    if seen is None or record is None or not store.missing(record.generation.images):
        return Repair(True, f"left {key}: it names no missing images any more")
    document = seen.document
    if document.state is State.CLAIMED:
        return Repair(False, f"left {key}: somebody is at work on it")
    token = document.answer.token if document.answer else document.token
    paid = payment(token, record.run_id, "paid for, but its images are lost")
    facts = {"state": State.RELEASED, "answer": None, "also_paid": (*document.also_paid, paid)}
    said = f"released {key}: the next run pays for it anew; what was paid stays noted"
    return _swap(documents, seen, facts_of(document) | facts, said)


def _give_up_answers(store: ImageStore, finding: Finding) -> Repair:
    """Strike off the answers that nobody can read; that they were paid for stays noted."""
    (key,) = finding.records
    documents, seen, _ = standing(store, key)
    if seen is None or not seen.document.kept:
        return Repair(True, f"left {key}: it names no such answer any more")
    if seen.document.state is State.CLAIMED:
        return Repair(False, f"left {key}: somebody is at work on it")
    then = "its images stay" if seen.document.answer else "the next run pays for it anew"
    said = f"gave up what can't be read of {key}: {then}; the answer stays, as an orphan"
    return _swap(documents, seen, facts_of(seen.document) | {"kept": ()}, said)


def _end_claim(store: ImageStore, finding: Finding) -> Repair:
    """Note that a dead holder's request may have been paid for; an answer that a refresh kept stands again."""
    (key,) = finding.records
    documents, seen, record = standing(store, key)
    if seen is None or seen.tag != finding.tag or seen.document.holder is None:
        return Repair(True, f"left {key}: it has changed")
    what = "its holder died or was cut off, perhaps after sending; found when the store was verified"
    note = payment(seen.document.token, seen.document.holder.run_id, what)
    document, said = seen.document, "its earlier answer stands again"
    if record is None or store.missing(record.generation.images):
        document = document.model_copy(update={"answer": None})
        said = "its outcome is noted as unknown"
    return _swap(documents, seen, resting(document, State.UNKNOWN, note), f"ended the claim {key}: {said}")


def _swap(documents: Documents, seen: Seen, facts: Mapping[str, Any], line: str) -> Repair:
    named = {"request_hash": seen.document.request_hash, "api_origin": documents.api_origin}
    past = replaced(seen.document, facts)
    document = Document(**named, token=secrets.token_hex(16), sequence=1, replaced=past, **facts)
    won = documents.swap(document, seen.tag).won
    return Repair(
        won, line if won else f"left {documents.key(document.request_hash)}: it has changed just now"
    )


def _delete_image(store: ImageStore, finding: Finding) -> Repair:
    (key,) = finding.images
    if answer_in(key) and keeps(store, key):
        return Repair(True, f"left {key}: its record names it")
    found = store.objects.look(key)
    request_hash = found.metadata.get("request-hash", "") if found else ""
    # a folder that is listed while it is written to may hide a record: ask for the one that the image names
    for folder in (slug_of(DEFAULT_BASE_URL), slug_of(SANDBOX_ORIGIN)):
        record = ledger_key(folder, request_hash)
        if document_in(record) and names(store, record, key):
            return Repair(True, f"left {key}: {record} names it")
    # whoever wrote it anew may be about to record it; stores tell times in seconds here, and in parts of them there
    if found and found.modified and found.modified - (finding.modified or 0) > 1:
        return Repair(True, f"left {key}: it was written anew meanwhile")
    return _delete(store, finding)


def _delete(store: ImageStore, finding: Finding) -> Repair:
    (key,) = finding.images
    if finding.modified is None or time.time() - finding.modified < SETTLED:
        return Repair(False, f"left {key}: it is younger than an hour, somebody may be at work on it")
    if finding.kind is Kind.HALF_WRITTEN:
        store.objects.delete_half_written(key)
    else:
        store.remove(key)
    return Repair(True, f"deleted {key}")
