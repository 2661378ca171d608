"""Part files: what a batch that is killed leaves of its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefect_ttapi import ImageStore
from prefect_ttapi.batch.recording import Parts
from prefect_ttapi.lineage.manifest import RowFile, read_manifest
from tests.support.rows import generated

FOLDER = "batches/1"
LONG = 1_000.0  # seconds that no test waits for


def eventually(true: Callable[[], object]) -> None:
    """Wait for what a thread does sooner or later."""
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def parts(store: ImageStore) -> list[str]:
    return sorted(found.key.rpartition("/")[2] for found in store.list(f"{FOLDER}/parts/"))


def rows_in(store: ImageStore, name: str) -> list[int]:
    lines = (store.read(f"{FOLDER}/parts/{name}") or b"").splitlines()
    return [row.row for row in read_manifest(lines)]


class Batch:
    """Rows that come, and the parts that are written of them."""

    def __init__(self, store: ImageStore, every: tuple[int, float]) -> None:
        self._rows = RowFile()
        self.parts = Parts(store, FOLDER, self._rows, every)

    def add(self, *rows: int) -> None:
        for row in rows:
            self._rows.add(generated(row))


@pytest.fixture
def batch(store: ImageStore) -> Iterator[Callable[[int, float], Batch]]:
    begun: list[Batch] = []

    def begin(rows: int, seconds: float) -> Batch:
        begun.append(Batch(store, (rows, seconds)))
        begun[-1].parts.__enter__()
        return begun[-1]

    yield begin
    for each in begun:
        each.parts.end()


def test_rows_are_written_as_they_come(store: ImageStore, batch: Callable[[int, float], Batch]) -> None:
    """When enough rows have come there is a part with them, in the order they came in; the next has the next."""
    run = batch(3, LONG)
    run.add(5, 0, 2)
    eventually(lambda: parts(store) == ["000001.jsonl"])
    run.add(1, 4)
    run.add(3)
    eventually(lambda: parts(store) == ["000001.jsonl", "000002.jsonl"])
    assert [rows_in(store, part) for part in parts(store)] == [[5, 0, 2], [1, 4, 3]]


def test_few_rows_are_written_after_a_while(store: ImageStore, batch: Callable[[int, float], Batch]) -> None:
    """Where rows are slow to come, those that are there are written when the time is up."""
    run = batch(500, 0.05)
    run.add(0)
    eventually(lambda: parts(store))
    assert rows_in(store, "000001.jsonl") == [0]


def test_a_short_batch_writes_none(store: ImageStore, batch: Callable[[int, float], Batch]) -> None:
    """A batch that is over before a part is due writes none, and waits for none."""
    run = batch(500, LONG)
    run.add(*range(499))
    run.parts.end()
    assert parts(store) == []


def test_parts_are_removed(store: ImageStore, batch: Callable[[int, float], Batch]) -> None:
    """Once the manifest is there its parts go, also those of an attempt before; other batches' stay."""
    store.write(f"{FOLDER}/parts/000009.jsonl", b"", "application/x-ndjson")
    store.write(f"{FOLDER}/2/parts/000001.jsonl", b"", "application/x-ndjson")
    run = batch(1, LONG)
    run.add(0)
    eventually(lambda: "000001.jsonl" in parts(store))
    run.parts.end()
    run.parts.remove()
    assert parts(store) == []
    assert store.read(f"{FOLDER}/2/parts/000001.jsonl") == b""


def test_trouble_is_told_once_and_no_row_is_lost(
    store: ImageStore, batch: Callable[[int, float], Batch], caplog: pytest.LogCaptureFixture
) -> None:
    """While the store is in trouble rows wait for the next part; the log hears of it once."""
    in_the_way = Path(store.url) / FOLDER / "parts"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder")
    run = batch(2, 0.02)
    run.add(0, 1)
    eventually(lambda: "could not be written" in caplog.text)
    run.add(2, 3)
    time.sleep(0.2)  # for more attempts, which say nothing
    in_the_way.unlink()
    eventually(lambda: parts(store))
    assert rows_in(store, "000001.jsonl") == [0, 1, 2, 3]
    assert caplog.text.count("could not be written") == 1
