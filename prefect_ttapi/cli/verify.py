"""The command `verify`: read a whole store, say what is wrong, put right what surely can be."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Final

from prefect_ttapi.cli.checks import IMAGES, LEDGER, LISTING, MANIFESTS, verify
from prefect_ttapi.cli.findings import HEADINGS, Finding, Kind
from prefect_ttapi.cli.repair import Repair, repair
from prefect_ttapi.cli.reporting import Progress
from prefect_ttapi.cli.stores import store_at

#: Findings of each kind that are shown; --json has all.
SHOWN: Final = 10

#: The totals, and the kinds of work that they count.
_TOTALS: Final = {"records": LEDGER, "images": LISTING, "images_read": IMAGES, "manifest_rows": MANIFESTS}


def run(
    address: str,
    endpoint_url: str | None,
    *,
    quick: bool,
    repairs: bool,
    delete_orphans: bool,
    as_json: bool,
) -> int:
    """Verify, and repair where asked to; return the exit status."""
    if delete_orphans and not repairs:
        raise ValueError("--delete-orphans needs --repair")
    progress = Progress(sys.stderr)
    shown = _Shown(as_json=as_json)
    try:
        store = store_at(address, endpoint_url)
        for finding in verify(store, quick=quick, progress=progress):
            mend = repairs and finding.wrong
            done = repair(store, finding, delete_orphans=delete_orphans) if mend else None
            progress.clear()
            shown.add(finding, done)
    except sqlite3.Error as error:
        raise OSError(f"there is no room for temporary files: {error}") from error
    finally:
        progress.clear()
    totals = {name: progress.done.get(doing, 0) for name, doing in _TOTALS.items()}
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
            yield f"{HEADINGS[kind]}: {self._counts[kind]:,}"
            yield from self._first[kind]
            if self._counts[kind] > SHOWN:
                yield f"  and {self._counts[kind] - SHOWN:,} more; --json has all"
        counted = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in totals.items())
        repaired = f", {self._repaired:,} put right" if self._repaired else ""
        verdict = f"{self.wrong:,} wrong" if self.wrong else "all is well"
        yield f"{store}: {counted}: {verdict}{repaired}"
