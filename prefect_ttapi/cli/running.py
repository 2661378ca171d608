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
from typing import NoReturn

from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import temporary_settings
from pydantic import SecretStr

from prefect_ttapi.cli.arguments import Paying
from prefect_ttapi.cli.reporting import Loudness, loudness
from prefect_ttapi.cli.stores import credentials_of
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.generation.temporary_server import TEMPORARY_SERVER, leave, leave_soon
from prefect_ttapi.sandbox import Sandbox


@contextmanager
def payer(paying: Paying) -> Iterator[TTAPICredentials]:
    """Give the credentials that a command line names; with --sandbox, those of a sandbox that runs meanwhile.

    Raises:
        ValueError: there is no such block, nor a key in the environment; or there is no sandbox to have credentials for
            testing.
    """
    if paying.sandbox:
        with Sandbox(content_credentials=paying.content_credentials) as sandbox:
            yield TTAPICredentials(api_key=SecretStr("sandbox"), base_url=sandbox.base_url)
    elif paying.content_credentials:
        raise ValueError("--content-credentials is for images of the sandbox: it goes with --sandbox")
    else:
        yield credentials_of(paying.credentials)


def quiet_logs() -> None:
    """Show of the logs what a person needs, till the end of the process: Prefect's server gets all of them."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    for handler in handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    asked = loudness()
    if asked is Loudness.VERBOSE:
        return True
    if record.name.startswith("prefect.task_runs"):  # the run's own warnings tell it again
        return record.levelno >= logging.CRITICAL
    # a display of the progress tells how a run begins and goes on
    told_anyway = sys.stderr.isatty() and record.name.startswith("prefect")
    return record.levelno >= logging.WARNING or not (told_anyway or asked is Loudness.QUIET)


_INTERRUPTED = "interrupted: what was answered in time is in the store, and the next run goes on from there"
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
            print(_INTERRUPTED, file=sys.stderr)
            leave_soon(128 + came[0])
            raise SystemExit(128 + came[0]) from None
        finally:
            # once interrupted, the process ends, and is not to be held up by threads that are still busy
            for number, handler in before.items() if not came else ():
                signal.signal(number, handler)
