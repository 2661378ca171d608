"""Ctrl-C and SIGTERM at a command line: the first lets what is under way come to an end, a second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from prefect_ttapi.generation.temporary_server import leave

_STOPPING = b"\nStopping: what is under way is finished and recorded. Press Ctrl-C again to leave at once.\n"


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end; `exit_status` is what it then ends with, as a shell would tell it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C or SIGTERM raises `Interrupted` once; from then on either ends the process on the spot.

    While a flow runs, Prefect has a handler of its own for SIGTERM, which lets the flow come to an end and then sends
    the signal again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> NoReturn:
        if came:
            leave(128 + number)
        came.append(number)
        if number == signal.SIGINT:
            os.write(2, _STOPPING)  # print could be in the middle of something
        raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        # once interrupted, the process ends, and is not to be held up by threads that are still busy
        for number, handler in before.items() if not came else ():
            signal.signal(number, handler)
