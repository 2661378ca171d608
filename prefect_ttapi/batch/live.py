"""Tell how a batch is getting on: a bar and a line at the end of a terminal, or lines in the log every so often."""

from __future__ import annotations

import logging
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final, Self, TextIO

from rich.console import Console, RenderableType
from rich.control import Control
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from prefect_ttapi.lineage.report import Totals

#: Seconds between two drawings of the line, and between lines in the log, of which the first comes sooner.
REDRAW: Final = 0.2
FIRST_LOGGED: Final = 10.0
LOGGED: Final = 30.0

#: Time left is told after so many requests: one that is back tells nothing yet of those beside it.
ENOUGH: Final = 5

#: One batch at a time has the terminal; others of the process write to the log.
_TERMINAL: Final = threading.Lock()


@dataclass(frozen=True)
class Standing:
    """The progress of a batch.

    Attributes:
        totals: of the rows that are there.
        total: rows that there will be, where that is known.
        in_flight: requests under way, where that is known.
        sent: rows of requests that had to be sent.
        sending: seconds since the first of them was sent.
        over: nothing more is to come.
    """

    totals: Totals
    total: int | None = None
    in_flight: int | None = None
    sent: int = 0
    sending: float = 0.0
    over: bool = False

    @property
    def done(self) -> int:
        """Rows that came to an end: what was skipped is left to another run."""
        return self.totals.rows - self.totals.skipped

    @property
    def seconds_left(self) -> float | None:
        """Time left by the pace of what was sent so far, as if all of the rest had to be; None while unknown."""
        if self.over or self.total is None or self.sent < ENOUGH:
            return None
        return (self.total - self.totals.rows) * self.sending / self.sent

    def line(self, width: int | None = None) -> str:
        """Return the line, in at most `width` characters, without the parts that matter less.

        >>> Standing(Totals(rows=120, cached=30, failed=2, usd=3.2), 1_000, in_flight=8).line()
        '120 of 1,000 done, 30 cached, 2 failed, 8 in flight, 3.20 USD'
        >>> Standing(Totals(rows=5, skipped=3), 5).line()
        '2 of 5 done, 3 skipped'
        """
        told = [part for part in self._told() if part[1]]
        while width is not None and len(told) > 1 and len(_joined(told)) > width:
            told.remove(max(told))
        return _joined(told)[:width]

    def _told(self) -> Iterator[tuple[int, str]]:
        """Yield the parts of the line, each with its rank: 0 matters most."""
        totals, left = self.totals, self.seconds_left
        of = f" of {self.total:,}" if self.total is not None else ""
        images = totals.images - totals.images_cached
        pace = 60 * images / self.sending if images and self.sending else 0.0
        yield 0, f"{self.done:,}{of} done"
        yield 4, f"{totals.cached:,} cached" if totals.cached else ""
        yield 1, f"{totals.failed:,} failed" if totals.failed else ""
        yield 1, f"{totals.skipped:,} skipped" if totals.skipped else ""
        yield 3, f"{self.in_flight:,} in flight" if self.in_flight is not None and not self.over else ""
        yield 6, f"{pace:,.0f} images/min" if pace >= 10 else f"{pace:.1f} images/min" if pace else ""
        yield 7, f"{totals.total_tokens:,} tokens" if totals.total_tokens else ""
        yield 5, f"{totals.usd:,.2f} USD" if totals.usd is not None else ""
        yield 2, f"{duration(left)} left" if left else ""


def _joined(told: list[tuple[int, str]]) -> str:
    return ", ".join(text for _, text in told)


def duration(seconds: float) -> str:
    """Return a duration in words.

    >>> duration(42), duration(170), duration(9_000)
    ('42 s', '3 min', '2 h 30 min')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Background(ABC):
    """Work in a thread of its own, from the beginning of the context to its end."""

    def __init__(self, name: str) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End it; a step that is under way is finished."""
        self._ended.set()
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Work until `_ended` is set."""


class Live(Background):
    """Tell how a batch stands until it is ended.

    In a terminal that is a bar and a line, below what is logged meanwhile, and stays there at the end; else, and for
    TERM=dumb, lines in the log.

    Args:
        standing: asked for each line, from the thread.
        log: takes a line.
        stream: the terminal, if it is one.
        every: seconds till the first line in the log, and from one to the next.
    """

    def __init__(
        self,
        standing: Callable[[], Standing],
        log: Callable[[str], None],
        stream: TextIO | None = None,
        every: tuple[float, float] = (FIRST_LOGGED, LOGGED),
    ) -> None:
        super().__init__("ttapi-live")
        self._standing = standing
        self._log = log
        self._stream = stream or sys.stderr
        self._every = every

    def _run(self) -> None:
        with _terminal(self._stream) as display:
            if display is not None:
                while not self._ended.wait(REDRAW):
                    display.draw(self._standing())
                display.end(self._standing())
                return
        first, every = self._every
        ended = self._ended.wait(first)
        while not ended:
            self._log(self._standing().line())
            ended = self._ended.wait(every)


@contextmanager
def _terminal(stream: TextIO) -> Iterator[_Display | None]:
    """Yield the display of a terminal; None where there is no terminal to have."""
    if not _is_terminal(stream) or not _TERMINAL.acquire(blocking=False):
        yield None
        return
    display = _Display(stream)
    with ExitStack() as after:
        after.callback(_TERMINAL.release)
        for handler in _handlers():
            handler.addFilter(above := display.above(handler))
            after.callback(handler.removeFilter, above)
        yield display


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (ValueError, AttributeError):  # closed, or a log handler's that is not open yet
        return False


def _handlers() -> list[logging.Handler]:
    """Return the log handlers that write to a terminal."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    return [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and _is_terminal(handler.stream)
    ]


#: Columns of the bar: at least, or there is none; and at most.
_BAR: Final = (8, 24)


class _Display:
    """The last line of a terminal, drawn again and again, below what log handlers write.

    The cursor waits at its beginning, so that what is written by no log handler writes over it.
    """

    def __init__(self, stream: TextIO) -> None:
        console = Console(file=stream, force_terminal=True, force_jupyter=False, highlight=False)
        self._live = RichLive(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._lock = threading.RLock()  # a signal's handler may log while its thread is at it
        self._shown: tuple[Standing, int] | None = None

    def draw(self, standing: Standing) -> None:
        """Show it, unless it is shown already."""
        with self._lock, suppress(OSError, ValueError):  # a terminal that was closed needs no line
            drawn = self._drawn(standing)
            if (shown := (standing, self._live.console.width)) != self._shown:
                self._live.start()
                self._live.update(drawn)
                self._shown = shown
                self._refresh()

    def end(self, standing: Standing) -> None:
        """Leave how it ended on the screen."""
        with self._lock, suppress(OSError, ValueError):
            self._live.stop()
            self._live.console.print(self._drawn(replace(standing, over=True)))

    def above(self, handler: logging.Handler) -> Callable[[logging.LogRecord], bool]:
        """Return a filter that has the handler write above the line, and stops the record, as it is written."""

        def write(record: logging.LogRecord) -> bool:
            with self._lock:
                with suppress(OSError, ValueError):
                    self._live.stop()
                handler.acquire()
                try:
                    handler.emit(record)
                finally:
                    handler.release()
                with suppress(OSError, ValueError):
                    if self._shown is not None:
                        self._live.start()
                        self._refresh()
            return False

        return write

    def _refresh(self) -> None:
        self._live.refresh()
        # a process that is killed must not leave a terminal without its cursor
        self._live.console.control(Control(ControlType.CARRIAGE_RETURN, ControlType.SHOW_CURSOR))

    def _drawn(self, standing: Standing) -> RenderableType:
        """Return a bar and a line within the width of the terminal."""
        console = self._live.console
        with suppress(OSError):  # rich asks the standard streams only
            console.width = os.get_terminal_size(console.file.fileno()).columns or console.width
        line = standing.line(console.width - 1)
        least, most = _BAR
        width = min(most, console.width - len(line) - 2)
        if width < least or not standing.total:
            return Text(line)
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(standing.total, standing.done, width, complete_style="cyan", finished_style="green")
        grid.add_row(bar, Text(line, no_wrap=True))
        return grid
