"""How commands run flows: with a sandbox if need be, few log lines, and an end in order at Ctrl-C and SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import temporary_settings

from prefect_ttapi.cli.reporting import Loudness, loudness
from prefect_ttapi.generation.temporary_server import TEMPORARY_SERVER, leave, leave_soon
from prefect_ttapi.sandbox import Sandbox


@contextmanager
def sandbox_if(asked_for: bool, *, content_credentials: bool = False) -> Iterator[None]:
    """Run a sandbox in this process for the time being, named by the environment, if it is asked for.

    Args:
        content_credentials: its images have test credentials.

    Raises:
        ValueError: there is no sandbox to have such images.
    """
    if not asked_for:
        if content_credentials:
            raise ValueError("--content-credentials is for images of the sandbox: it goes with --sandbox")
        yield
        return
    with Sandbox(content_credentials=content_credentials) as sandbox:
        before = dict(os.environ)
        os.environ.update(TTAPI_BASE_URL=sandbox.base_url, TTAPI_API_KEY="sandbox")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


#: Levels below which a person needs no log line: what task runs say, the run's own warnings tell again.
_LEAST: Final = {
    Loudness.QUIET: {"": logging.WARNING, "prefect.task_runs": logging.CRITICAL},
    Loudness.NORMAL: {"prefect.task_runs": logging.CRITICAL},
    Loudness.VERBOSE: {},
}
#: The same beside a display of the progress, which tells how a run begins and goes on.
_BESIDE_PROGRESS: Final = {"prefect": logging.WARNING}


def quiet_logs() -> None:
    """Show of the logs what a person needs, till the end of the process: Prefect's server gets all of them."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    for handler in handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    asked = loudness()
    least = _LEAST[asked]
    if asked is not Loudness.VERBOSE and sys.stderr.isatty():
        least = _BESIDE_PROGRESS | least
    return record.levelno >= max(
        (level for name, level in least.items() if record.name.startswith(name)), default=logging.NOTSET
    )


_STOPPING = b"\nStopping: what is under way is finished and recorded. Press Ctrl-C again to leave at once.\n"


@contextmanager
def at_a_terminal() -> Iterator[None]:
    """Run flows as a person at a terminal expects: with few log lines, and an end in order where a signal asks for it.

    Ctrl-C or SIGTERM raises KeyboardInterrupt once; from then on either ends the process on the spot. While a flow
    runs, Prefect has a handler of its own for SIGTERM, which lets the flow come to an end and then sends the signal
    again.

    Raises:
        SystemExit: a signal asked for the end; the status is what a shell would tell.
    """
    quiet_logs()
    with temporary_settings(set_defaults=TEMPORARY_SERVER):
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
            raise KeyboardInterrupt(signal.Signals(number).name)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except KeyboardInterrupt:
            if not came:
                raise
            print(
                "interrupted: what was answered in time is in the store, and the next run goes on from there",
                file=sys.stderr,
            )
            leave_soon(128 + came[0])
            raise SystemExit(128 + came[0]) from None
        finally:
            # once interrupted, the process ends, and is not to be held up by threads that are still busy
            for number, handler in before.items() if not came else ():
                signal.signal(number, handler)
