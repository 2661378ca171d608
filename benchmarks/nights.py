"""What a night leaves behind: bytes in the store and in Prefect's database, and how much of `max_in_flight` is in use.

    python benchmarks/nights.py [PROMPTS] [SECONDS] [IN_FLIGHT] [SHARD_SIZE]

Three nights with the same prompts (1,000), of which two change nothing. Answers take so many seconds (0).
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="nights-"))
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

from prefect import flow

from prefect_ttapi import ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.sandbox import Sandbox

HOME = Path(os.environ["PREFECT_HOME"])

#: Seconds after which events are in the database.
SETTLED = 15


def in_store(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("batches/**/*") if path.is_file())


def in_database() -> int:
    """Return the bytes of the database that are in use."""
    time.sleep(SETTLED)
    with sqlite3.connect(f"file:{HOME / 'prefect.db'}?mode=ro", uri=True, timeout=60) as database:
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (database.execute(f"pragma {name}").fetchone()[0] for name in names)
    return int((pages - free) * size)


@flow
def nights(prompts: int, seconds: float, in_flight: int, shard_size: int | None) -> None:
    """Run the nights, one after the other, and print what each of them wrote."""
    folder = Path(tempfile.mkdtemp(prefix="nights-"))
    requests = [{"prompt": f"garden {number}", "size": "256x256"} for number in range(prompts)]
    with Sandbox(latency=seconds) as sandbox:
        credentials = TTAPICredentials(api_key="sandbox", base_url=sandbox.base_url)
        before = in_store(folder), in_database()
        for night in range(3):
            report = generate_batch(
                requests,
                credentials,
                ImageStore(url=str(folder)),
                max_in_flight=in_flight,
                shard_size=shard_size,
                name="nightly",
            )
            after = in_store(folder), in_database()
            store, database = ((new - old) / 1e6 for new, old in zip(after, before, strict=True))
            runs = len({row.task_run_id for row in report.rows}) if not night else 0
            share = prompts / in_flight * seconds / report.seconds if not night else 0.0
            print(
                f"night {night}: {report.summary}; store {store:.3f} MB, database {database:.2f} MB; "
                f"{runs} task runs, {share:.2f} of {in_flight} in use",
                flush=True,
            )
            before = after


if __name__ == "__main__":
    given = [*sys.argv[1:], *["1000", "0", "32", "0"][len(sys.argv) - 1 :]]
    nights(int(given[0]), float(given[1]), int(given[2]), int(given[3]) or None)
