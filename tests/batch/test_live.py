"""How a batch stands: a line in a terminal that leaves room for others, or a line in the log every so often."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import select
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.batch.live import Live, Standing
from prefect_ttapi.lineage.report import Totals

BUSY = Standing(
    Totals(rows=120, cached=30, failed=2, images=118, images_cached=30, total_tokens=1_234_567, usd=3.2),
    total=1_000,
    in_flight=8,
    sent=88,
    sending=120.0,
)
WHOLE = "120 of 1,000 done, 30 cached, 2 failed, 8 in flight, 44 images/min, 1,234,567 tokens, 3.20 USD, 20 min left"


def test_what_a_line_tells() -> None:
    """Done, cached, failed, in flight, pace, tokens, money and time left; what is not known is not told."""
    assert BUSY.line() == WHOLE
    assert Standing(Totals(rows=7)).line() == "7 done"
    assert Standing(Totals(rows=9, skipped=4, cached=5), total=9).line() == "5 of 9 done, 5 cached, 4 skipped"
    assert Standing(Totals(), total=5, in_flight=0).line() == "0 of 5 done, 0 in flight"


@given(st.integers(0, 130))
def test_a_line_fits(width: int) -> None:
    """On a narrow terminal what matters less goes first, and no line is longer than the terminal is wide."""
    line = BUSY.line(width)
    assert len(line) <= width
    assert set(line.split(", ")) <= set(WHOLE.split(", ")) or width < len("120 of 1,000 done")


def test_what_matters_most_stays() -> None:
    """Progress, failures and time left are the last to go."""
    assert BUSY.line(50) == "120 of 1,000 done, 2 failed, 20 min left"


def test_cached_rows_say_nothing_of_the_time_left() -> None:
    """Time left is by the pace of what had to be sent: 900 rows that were there before make nothing quicker."""
    assert Standing(Totals(rows=990, cached=900), 1_080, sent=90, sending=900).seconds_left == 900
    assert Standing(Totals(rows=900, cached=900), 1_000, sent=0).seconds_left is None
    assert Standing(Totals(rows=90), None, sent=90, sending=900).seconds_left is None


class Terminal:
    """A terminal of so many columns, and what was written to it."""

    def __init__(self, columns: int) -> None:
        self._master, slave = pty.openpty()
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.written = ""
        self.has_cursor = True

    def until(self, text: str, times: int = 1) -> None:
        """Read until `text` was written so often, which a batch's thread will do sooner or later."""
        while self.written.count(text) < times:
            ready, _, _ = select.select([self._master], [], [], 20)
            assert ready, f"nothing more came after {self.written!r}"
            self.written += os.read(self._master, 4_096).decode()

    def screen(self) -> list[str]:
        """The lines that a person sees."""
        lines = [""]
        row = column = 0
        for piece in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", self.written):
            match piece:
                case "\n":
                    row, column = row + 1, 0
                    lines += [""] * (row + 1 - len(lines))
                case "\r":
                    column = 0
                case "\x1b[2K":
                    lines[row] = ""
                case "\x1b[1A":
                    row -= 1
                case "\x1b[?25l" | "\x1b[?25h":
                    self.has_cursor = piece.endswith("h")
                case colours if colours.endswith("m") and "\x1b" in colours:
                    pass
                case _:
                    assert "\x1b" not in piece, f"{piece!r} is not understood here"
                    before = lines[row][:column].ljust(column)
                    lines[row] = before + piece + lines[row][column + len(piece) :]
                    column += len(piece)
        return lines[: row + 1]

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Terminal]]:
    monkeypatch.setenv("TERM", "xterm")
    opened: list[Terminal] = []

    def new(columns: int) -> Terminal:
        opened.append(Terminal(columns))
        return opened[-1]

    yield new
    for each in opened:
        each.close()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name == "ttapi-live"}


def test_a_line_lives_in_a_terminal_and_stays(terminal: Callable[[int], Terminal]) -> None:
    """The line is drawn without anything happening, fits the terminal, and stays at the end, without its thread."""
    screen = terminal(60)
    with Live(lambda: BUSY, print, screen.stream):
        screen.until("left\r")
        screen.until("\x1b[?25h")
        assert screen.screen() == [BUSY.line(59)]
        assert screen.has_cursor
    screen.stream.write("$ ")
    screen.stream.flush()
    screen.until("$ ")
    assert screen.screen() == ["━╺━━━━━━━━ 120 of 1,000 done, 30 cached, 2 failed, 3.20 USD", "$ "]
    assert screen.has_cursor
    assert not threads()


def test_logs_and_the_line_are_never_mixed(terminal: Callable[[int], Terminal]) -> None:
    """What handlers log to the terminal stands on lines of its own, above the line, which comes back below."""
    screen = terminal(120)
    log = logging.getLogger("tests.live")
    handler = logging.StreamHandler(screen.stream)
    log.addHandler(handler)
    log.addHandler(not_open_yet := logging.FileHandler(os.devnull, delay=True))
    try:
        with Live(lambda: BUSY, print, screen.stream):
            for number in range(3):
                screen.until("left\r", times=number + 1)
                log.warning("record %d", number)
        log.warning("the end")
        screen.until("the end")
    finally:
        log.removeHandler(handler)
        log.removeHandler(not_open_yet)
        not_open_yet.close()
    shown = screen.screen()
    assert shown[:3] == ["record 0", "record 1", "record 2"]
    assert shown[3].endswith(
        "━ 120 of 1,000 done, 30 cached, 2 failed, 44 images/min, 1,234,567 tokens, 3.20 USD"
    )
    assert shown[4:] == ["the end", ""]
    assert not handler.filters


def test_elsewhere_the_log_hears_of_it(
    monkeypatch: pytest.MonkeyPatch, terminal: Callable[[int], Terminal]
) -> None:
    """Where there is no terminal, a dumb one, or one that another batch has, lines go to the log now and then."""

    def logged(stream: TextIO) -> str:
        came: list[str] = []
        twice = threading.Event()

        def log(line: str) -> None:
            came.append(line)
            if len(came) == 2:
                twice.set()

        with Live(lambda: BUSY, log, stream, every=(0.01, 0.01)):
            assert twice.wait(20)
        return came[0]

    assert logged(io.StringIO()) == WHOLE
    first = terminal(80)
    with Live(lambda: BUSY, print, first.stream):
        first.until("left\r")
        assert logged(terminal(80).stream) == WHOLE
    monkeypatch.setenv("TERM", "dumb")
    assert logged(terminal(80).stream) == WHOLE


def test_a_short_batch_logs_nothing() -> None:
    """A batch that is over before the first line is due writes none, and does not wait for it."""
    with Live(lambda: BUSY, pytest.fail, io.StringIO()):
        pass
    assert not threads()
