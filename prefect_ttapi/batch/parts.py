"""What a batch that is killed leaves behind: its rows so far, in part files beside where the manifest would be."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Final, Self

from prefect_ttapi.batch.rowfile import Mark, RowFile
from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.objects import Facts
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: A part is written when so many rows, or seconds, have gathered since the one before.
PART_ROWS: Final = 500
PART_SECONDS: Final = 30.0


class Parts:
    """Writes `<folder>/parts/000001.jsonl` and so on, rows as they came, from a thread that holds up nobody.

    Args:
        store: where they go.
        folder: of the batch, in `store`.
        rows: of the batch; `came` is called after each.
        every: rows, and seconds, of a part.
    """

    def __init__(
        self,
        store: ImageStore,
        folder: str,
        rows: RowFile,
        every: tuple[int, float] = (PART_ROWS, PART_SECONDS),
    ) -> None:
        self._store = store
        self._folder = f"{folder}/parts/"
        self._rows = rows
        self._every_rows, self._every_seconds = every
        self._written = Mark()
        self._enough = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="ttapi-parts", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def came(self) -> None:
        """One more row is in the file."""
        if self._rows.mark.rows - self._written.rows >= self._every_rows:
            self._enough.set()

    def end(self) -> None:
        """Write no more; one that is under way is finished."""
        self._ended = True
        self._enough.set()
        self._thread.join()

    def remove(self) -> None:
        """Remove all parts, also those of an earlier attempt: the manifest has their rows."""
        try:
            for part in list(self._store.list(self._folder)):
                self._store.remove(part.key)
        except StoreError as error:
            logger.info("Part files are left beside the manifest: %s", error)

    def _run(self) -> None:
        number = 1
        failed = False
        while not self._ended:
            self._enough.wait(self._every_seconds)
            self._enough.clear()
            mark = self._rows.mark
            if self._ended or mark == self._written:
                continue
            try:
                self._write(number, mark)
                number += 1
            except Exception as error:
                if not failed:
                    logger.warning("Rows so far could not be written; trying again as more come: %s", error)
                failed = True
                self._pause()

    def _write(self, number: int, mark: Mark) -> None:
        part = self._rows.between(self._written, mark)
        key = f"{self._folder}{number:06d}.jsonl"
        self._store.objects.write(key, part.open, Facts("application/x-ndjson"))
        self._written = mark

    def _pause(self) -> None:
        """The store is in trouble: more rows are no reason to try again at once."""
        until = time.monotonic() + self._every_seconds
        while not self._ended and (rest := until - time.monotonic()) > 0:
            self._enough.wait(rest)
            self._enough.clear()
