"""What commands say: tables, errors, how far a long reading has come; and the reading of several things at once."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Final, TextIO, TypeVar
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.status import Status
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Seconds between two lines: on a terminal, and in a log.
_LIVE: Final = 0.1
_LOGGED: Final = 10.0

#: Things that are read at once: enough to keep an S3 service busy, and not too many for a disk.
THREADS: Final = 16


class Loudness(Enum):
    """How much a command says."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


_asked = Loudness.NORMAL


def loudness(asked: Loudness | None = None) -> Loudness:
    """Return how much is to be said; from now on as `asked`, if that is given."""
    global _asked
    _asked = asked or _asked
    return _asked


def say(*lines: object) -> None:
    """Print lines of a result, unless --quiet."""
    if loudness() is not Loudness.QUIET:
        print(*lines, sep="\n", flush=True)


def complain(error: object) -> None:
    """Print what is wrong, in the error stream; in red where that is a terminal with colours."""
    from pydantic_core import ValidationError

    from prefect_ttapi.capabilities import problems_of

    told = "; ".join(problems_of(error)) if isinstance(error, ValidationError) else str(error)
    Console(stderr=True, highlight=False).print(
        Text("error: ", "bold red"), Text(told), sep="", soft_wrap=True
    )


def show_table(rows: Sequence[Mapping[str, object]], *, texts: int, money: bool) -> None:
    """Print a table: within the width of a terminal, and at full width elsewhere.

    Args:
        rows: each has a cell by the head of each column; there must be one.
        texts: how many columns from the left hold texts; the others hold numbers.
        money: show the column `usd`.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    heads = [head for head in rows[0] if money or head != "usd"]
    for position, head in enumerate(heads):
        number = position >= texts
        table.add_column(head.replace("_", " "), justify="right" if number else "left", no_wrap=number)
    for row in rows:
        table.add_row(*(Text(_cell(row[head])) for head in heads))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def waiting_for(what: str) -> Status:
    """Show on a terminal, within the block, what is waited for."""
    return Console(stderr=True, quiet=loudness() is Loudness.QUIET).status(what)


def place(uri: str) -> str:
    """Return an address as a person opens it: a path for a file of this machine."""
    parts = urlsplit(uri)
    if parts.scheme != "file":
        return uri
    path = Path(unquote(parts.path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def utc(when: datetime) -> str:
    """Return a time in UTC as people read it, to the second."""
    return f"{when:%Y-%m-%d %H:%M:%S} UTC"


class Progress:
    """Shows what is being done: one line that changes on a terminal, a line every 10 seconds in a log.

    Attributes:
        done: how many things of each kind of work were done.

    Args:
        stream: where to show it; nowhere by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.done: dict[str, int] = {}
        self._stream = stream = None if loudness() is Loudness.QUIET else stream
        self._line: Live | None = None
        if stream is not None and stream.isatty():
            # other output is never redirected to this console: it may be the program's result
            self._line = Live(
                console=Console(file=stream),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        self._next = time.monotonic() + (0.0 if self._line else _LOGGED)

    def count(self, doing: str, things: Iterable[Item]) -> Iterator[Item]:
        """Return the things, each counted as it is taken."""
        for number, thing in enumerate(things, self.done.get(doing, 0) + 1):
            self.tell(doing, number)
            yield thing

    def tell(
        self, doing: str, done: int, total: int | None = None, read: int = 0, total_bytes: int | None = None
    ) -> None:
        """Note that so many things are done.

        Args:
            total: how many there are, where that is known.
            read: bytes that were read.
            total_bytes: how many there are to read, where bytes are read.
        """
        self.done[doing] = done
        now = time.monotonic()
        if self._stream is None or now < self._next:
            return
        self._next = now + (_LIVE if self._line else _LOGGED)
        of = f" of {total:,}" if total is not None else ""
        size_of = f", {decimal(read)} of {decimal(total_bytes)}" if total_bytes is not None else ""
        said = f"{doing}: {done:,}{of}{size_of}"
        if self._line:
            self._line.start()
            self._line.update(Text(said, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            print(said, file=self._stream, flush=True)

    def clear(self) -> None:
        """Take the line off the terminal, for others to write."""
        if self._line:
            self._line.stop()


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Do the same work on each item; return the results in order, with few of them in memory.

    Whoever stops asking waits only for what is under way.

    >>> list(side_by_side(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="ttapi-reading")
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(threads.submit(work, item))
            if len(under_way) > 2 * THREADS:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
