"""What commands say: tables, errors, how far a long reading has come; and the reading of several things at once."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from typing import Final, TextIO, TypeVar

from rich.console import Console
from rich.live import Live
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

    @classmethod
    def of(cls, *, quiet: bool, verbose: bool) -> Loudness:
        """Return what the options -q and -v ask for. ValueError: both were given."""
        if quiet and verbose:
            raise ValueError("--quiet and --verbose exclude each other")
        return cls.QUIET if quiet else cls.VERBOSE if verbose else cls.NORMAL


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

    told = str(error)
    if isinstance(error, ValidationError):
        told = "; ".join(problems_of(error))
    Console(file=sys.stderr, highlight=False).print(
        Text("error: ", "bold red"), Text(told), sep="", soft_wrap=True
    )


def show_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table: within the width of a terminal, and at full width elsewhere.

    Args:
        right: the heads of columns of numbers.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, justify="right" if head in right else "left", no_wrap=head in right)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Show on a terminal what is waited for."""
    console = Console(file=sys.stderr)
    if loudness() is Loudness.QUIET or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


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
        size_of = f", {size(read)} of {size(total_bytes)}" if total_bytes is not None else ""
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


def size(count: int) -> str:
    """Return a number of bytes for people.

    >>> size(999), size(1_500_000)
    ('999 B', '1.5 MB')
    """
    for unit, bytes_each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_each:
            return f"{count / bytes_each:.1f} {unit}"
    return f"{count} B"


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
