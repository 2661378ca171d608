"""The subcommand `verify`: read a whole store, say what is wrong, put right what surely can be."""

from __future__ import annotations

import argparse
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
from prefect_ttapi.errors import StoreError

#: Findings of each kind that are shown; --json has all.
SHOWN: Final = 10

#: The totals, and the kinds of work that they count.
_TOTALS: Final = {"records": LEDGER, "images": LISTING, "images_read": IMAGES, "manifest_rows": MANIFESTS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verify`."""
    parser.epilog = "Exit status: 0 all is well, or was put right; 1 something is wrong; 2 it can't be told."
    add = parser.add_argument
    add("store", metavar="STORE", help="a folder, s3://bucket/prefix, or block:NAME")
    add("--endpoint-url", metavar="URL", help="of an S3 service other than AWS")
    add("--quick", action="store_true", help="compare lengths only: don't read the images")
    add("--repair", action="store_true", help="put right what surely can be: a lost image, and an answer that can't be "
        "read, is paid for anew by the next run")  # fmt: skip
    add("--delete-orphans", action="store_true",
        help="with --repair: delete what nothing names and half-written files, older than an hour")  # fmt: skip
    add("--json", action="store_true", help="all findings as JSON Lines, the totals last")


def run(arguments: argparse.Namespace) -> int:
    """Verify, and repair where asked to; return the exit status."""
    if arguments.delete_orphans and not arguments.repair:
        raise ValueError("--delete-orphans needs --repair")
    progress = Progress(sys.stderr)
    shown = _Shown(as_json=arguments.json)
    trouble: tuple[int, object] | None = None
    try:
        store = store_at(arguments.store, arguments.endpoint_url)
        for finding in verify(store, quick=arguments.quick, progress=progress):
            mend = arguments.repair and finding.wrong
            done = repair(store, finding, delete_orphans=arguments.delete_orphans) if mend else None
            progress.clear()
            shown.add(finding, done)
    except (StoreError, sqlite3.Error) as error:  # the latter: no room for temporary files
        trouble = 2, error
    except KeyboardInterrupt:
        trouble = 130, "interrupted; nothing is left half done"
    finally:
        progress.clear()
    if trouble:
        print(f"prefect-ttapi verify: {trouble[1]}", file=sys.stderr)
        return trouble[0]
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
