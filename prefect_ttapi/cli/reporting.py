"""How far the reading of a store has come, and a line that says so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TextIO

#: Seconds between two lines: where a person looks on, and where they end in a log.
_LIVE: Final = 0.1
_LOGGED: Final = 10.0


@dataclass(frozen=True)
class Step:
    """What is being done, and how much of it is done.

    Attributes:
        doing: e.g. `reading the ledger`.
        done, total: of how many things; a total of None is not known.
        done_bytes, total_bytes: of how many bytes, where these count.
    """

    doing: str
    done: int
    total: int | None = None
    done_bytes: int | None = None
    total_bytes: int | None = None

    def __str__(self) -> str:
        of = f" of {self.total:,}" if self.total is not None else ""
        read = f", {size(self.done_bytes)}" if self.done_bytes is not None else ""
        of_bytes = f" of {size(self.total_bytes)}" if self.total_bytes is not None else ""
        return f"{self.doing}: {self.done:,}{of}{read}{of_bytes}"


#: Told of each step.
Tell = Callable[[Step], None]


def size(count: int) -> str:
    """A number of bytes for people.

    >>> size(999), size(1_500_000)
    ('999 B', '1.5 MB')
    """
    for unit, bytes_each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_each:
            return f"{count / bytes_each:.1f} {unit}"
    return f"{count} B"


class ProgressLine:
    """Shows steps on a stream: one line that changes on a terminal, else a line every 10 seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._every = _LIVE if self._live else _LOGGED
        self._next = time.monotonic() + (0 if self._live else _LOGGED)
        self._drawn = False

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        self._drawn = self._live
        print(
            f"\r\x1b[K{step}" if self._live else step,
            end="" if self._live else "\n",
            file=self._stream,
            flush=True,
        )

    def clear(self) -> None:
        """Take the line away, for others to write."""
        if self._drawn:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._drawn = False
