"""A batch's rows while it runs: in a temporary file as they come, read in the order of the requests."""

from __future__ import annotations

import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from prefect_ttapi.images.spool import Spool
from prefect_ttapi.lineage.manifest import Row, read_manifest, write_manifest

_CHUNK: Final = 256 * 1024


class Mark(NamedTuple):
    """How much had come at some moment."""

    rows: int = 0
    size_bytes: int = 0


class RowFile:
    """Rows as they come, in any order; 16 bytes of memory each.

    One thread adds; any thread may read what came up to a `mark`.

    >>> rows = RowFile()
    >>> for number in (2, 0):
    ...     rows.add(Row(row=number, status="skipped"))
    >>> [row.row for row in rows.rows()], rows.mark.rows
    ([0, 2], 2)
    """

    def __init__(self) -> None:
        self._spool = Spool()
        self._starts = array.array("q")
        self._sizes = array.array("q")
        self.mark = Mark()

    def add(self, row: Row) -> None:
        """Keep a row."""
        (line,) = write_manifest([row])
        missing = max(0, row.row + 1 - len(self._starts))
        self._starts.extend([0] * missing)
        self._sizes.extend([0] * missing)
        self._starts[row.row], self._sizes[row.row] = self._spool.size_bytes, len(line)
        self._spool.write(line)
        self.mark = Mark(self.mark.rows + 1, self._spool.size_bytes)

    def lines(self) -> Iterator[bytes]:
        """The rows' lines in the order of the requests; a row that never came is left out."""
        for start, size in zip(self._starts, self._sizes, strict=True):
            if size:
                yield self._spool.read_at(start, size)

    def rows(self) -> Iterator[Row]:
        """The rows in the order of the requests."""
        return read_manifest(self.lines())

    def between(self, one: Mark, other: Mark) -> Spool:
        """The lines that came from one mark to the other, as they came."""
        part = Spool()
        for start in range(one.size_bytes, other.size_bytes, _CHUNK):
            part.write(self._spool.read_at(start, min(_CHUNK, other.size_bytes - start)))
        return part
