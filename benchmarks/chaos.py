"""Kill paying processes: `make chaos`, or `benchmarks/chaos.py [--kills 1000] [--minutes 60] [--seed 1] [--write]`.

Six processes that want the same images, and batches of Prefect, are killed again and again at seeded moments, and
others go on: into a local folder, to S3 on moto's server and to S3 on Ceph's gateway (Debian's packages ceph-common,
ceph-mon, ceph-osd and radosgw). After each round the whole store is read and held against what the API has counted; the
first payment that no record names, image that is lost or claim that is left ends the program. It prints a table in
Markdown, and `--write` puts that into docs/figures.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path

# the servers, and what is killed, are those of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

from prefect_ttapi.storage.store import ImageStore
from tests.support.ceph import ceph_server
from tests.support.chaos import Tally, kill_and_go_on, race
from tests.support.prefect_server import Server, prefect_server
from tests.support.s3 import S3Server, moto_server

PLACES = ("folder", "moto", "ceph")
FIGURES = Path(__file__).parents[1] / "docs" / "figures.md"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
#: Kills of one race; a batch has ten.
RACE_KILLS = 30

Stores = Callable[[str], ImageStore]


def stores(folder: Path, moto: S3Server, ceph: S3Server) -> Stores:
    """What makes an empty store of each kind."""
    numbers = count()

    def make(place: str) -> ImageStore:
        here = folder / str(next(numbers))
        rescue = str(here / "rescue")
        if place == "folder":
            return ImageStore(url=str(here / "store"), rescue_folder=rescue)
        server = {"moto": moto, "ceph": ceph}[place]
        return ImageStore(url=f"s3://{server.new_bucket()}/art", rescue_folder=rescue, **server.settings())

    return make


def rounds(seed: int, make: Stores, server: Server, folder: Path) -> Iterator[tuple[str, str, Tally]]:
    """Without end: where, what was killed, and what became of it."""

    def batch(place: str) -> Tally:
        return kill_and_go_on(server, make(place), folder / f"{place}.log", seed)

    while True:
        with ThreadPoolExecutor(len(PLACES)) as threads:
            for place, tally in zip(PLACES, threads.map(batch, PLACES), strict=True):
                yield place, "a batch", tally
        for place in PLACES:
            yield place, "one of six processes", race(make(place), seed, RACE_KILLS)
        seed += 1


def table(found: dict[tuple[str, str], Tally], seconds: float, seed: int) -> str:
    """The table in Markdown, with what it is about."""
    heads = [
        *("where", "what was killed", *SIGNALS, "requests", "calls", "paid for", "paid twice, as noted"),
        *("in flight when killed", "orphans"),
    ]
    lines = []
    total = Tally()
    for (place, what), tally in sorted(found.items(), key=lambda item: PLACES.index(item[0][0])):
        lines.append([place, what, *_cells(tally)])
        total += tally
    lines.append(["all", "", *_cells(total)])
    kills = total.kills.total()
    told = f"{kills:,} kills in {seconds / 60:.0f} minutes on two cores, with seed {seed}."
    rows = [heads, ["---"] * len(heads), *lines]
    return told + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(tally: Tally) -> list[str]:
    counted = [tally.requests, tally.calls, tally.paid, tally.twice, tally.in_flight, tally.orphans]
    return [f"{number:,}" for number in [*(tally.kills[sign] for sign in SIGNALS), *counted]]


def write(text: str) -> None:
    """Put the table where the page has it."""
    page = FIGURES.read_text(encoding="utf-8")
    begin, end = "<!-- make chaos -->\n", "\n<!-- end -->"
    before, _, rest = page.partition(begin)
    FIGURES.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    options.add_argument("--kills", type=int, default=1000, help="at least so many")
    options.add_argument("--minutes", type=float, default=60, help="after which no other round begins")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--write", action="store_true", help="into docs/figures.md")
    asked = options.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    found: dict[tuple[str, str], Tally] = {}
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        ceph = running.enter_context(ceph_server())
        moto = running.enter_context(moto_server())
        server = running.enter_context(prefect_server(folder))
        make = stores(folder, moto, ceph)
        began = time.monotonic()
        for place, what, tally in rounds(asked.seed, make, server, folder):
            found.setdefault((place, what), Tally())
            found[place, what] += tally
            kills = sum(one.kills.total() for one in found.values())
            print(
                f"{time.monotonic() - began:6.0f} s {kills:5} kills; {what}, {place}: {tally}",
                file=sys.stderr,
            )
            if kills >= asked.kills or time.monotonic() - began >= 60 * asked.minutes:
                break
        text = table(found, time.monotonic() - began, asked.seed)
    print(text)
    if asked.write:
        write(text)


if __name__ == "__main__":
    main()
