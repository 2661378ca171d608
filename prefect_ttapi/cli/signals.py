"""Ctrl-C and SIGTERM at a command line: the first lets what is under way come to an end, a second leaves at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import copy_context
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_LOGGING_SERVER_LEVEL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
    temporary_settings,
)

if TYPE_CHECKING:
    from prefect.server.api.server import SubprocessASGIServer

#: A temporary server may be slow to start, and has nothing to say that a person at a command line could use.
TEMPORARY_SERVER: Final[Mapping[Any, Any]] = {
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120,
    PREFECT_LOGGING_SERVER_LEVEL: "CRITICAL",
    PREFECT_SERVER_ANALYTICS_ENABLED: False,
}

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
            _leave(128 + number)
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


def leave_soon(status: int, seconds: float = 5.0) -> None:
    """End the process in a few seconds at the latest: a usual exit waits for threads that wait for their answers."""
    leaving = threading.Timer(seconds, _leave, [status])
    leaving.daemon = True
    leaving.start()


class ServerDidNotStartError(OSError):
    """Prefect's temporary server does not start; the message is what it said."""


def start_server() -> None:
    """Where no Prefect server is set, start the temporary one that a flow would start, but out of Ctrl-C's reach.

    At a terminal Ctrl-C goes to every process in the foreground. A flow that comes to an end without its server goes
    on asking for it for minutes.

    Raises:
        ServerDidNotStartError: it ended instead (Prefect would try other ports until its time is up), or did not
            answer in that time.
    """
    if get_current_settings().api.url:
        return
    import_module("prefect.server.api.server")
    errors: list[Exception] = []

    def start() -> None:
        # a child inherits from the thread that starts it which signals are held back
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            get_client(sync_client=True)
        except Exception as error:
            errors.append(error)

    # in this context, which Prefect's settings are part of
    starting = threading.Thread(target=copy_context().run, args=(start,), name="server-start", daemon=True)
    starting.start()
    started: list[subprocess.Popen[bytes]] = []
    while starting.is_alive():
        starting.join(0.1)
        server = _temporary_server()
        if server and server.server_process and server.server_process not in started:
            started.append(server.server_process)
        if server and any(process.poll() is not None for process in started):
            server.stop()
            raise ServerDidNotStartError(_why_no_server())
    if errors:
        raise ServerDidNotStartError(_why_no_server()) if started else errors[0]


def _why_no_server() -> str:
    """Return what a server says that ends at once, started once more for that: Prefect's own is told to be silent."""
    command = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--port", "0"]
    with temporary_settings({PREFECT_LOGGING_SERVER_LEVEL: "ERROR"}):
        settings = get_current_settings()
    try:
        said = subprocess.run(  # noqa: S603
            [sys.executable, *command, "--log-level", "error"],
            env=os.environ | settings.to_environment_variables(exclude_unset=True),
            capture_output=True,
            text=True,
            timeout=settings.server.ephemeral.startup_timeout_seconds,
            check=False,
        ).stderr
    except subprocess.TimeoutExpired:
        said = ""
    # the last line of a traceback is the error
    lines = [line for line in said.splitlines() if re.match(r"[\w.]+: \S", line)] or ["it said nothing"]
    return (
        f"Prefect's temporary server does not start: {lines[-1]}. "
        f"Set PREFECT_HOME, now {settings.home}, to another folder, or PREFECT_API_URL to a server that runs"
    )


def _temporary_server() -> SubprocessASGIServer | None:
    loaded: Any = sys.modules.get("prefect.server.api.server")
    server: SubprocessASGIServer | None = loaded and loaded.SubprocessASGIServer()
    return server


def _leave(status: int) -> NoReturn:
    """End the process without waiting for its threads: a usual exit waits for all that a task runner has started."""
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
        if (server := _temporary_server()) and server.server_process:
            server.server_process.terminate()
    os._exit(status)
