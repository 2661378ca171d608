"""Prefect's temporary server: it is started out of Ctrl-C's reach, and started again where Ctrl-C has ended it.

At a terminal Ctrl-C goes to every process in the foreground. A flow that comes to an end without its server goes on
asking for it for minutes, and so does the exit of its process.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import cache
from importlib import import_module
from types import FrameType, TracebackType
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

#: Seconds in which a server that Ctrl-C has reached closes its port.
_CLOSING: Final = 0.7

#: Seconds for which an interrupted run waits for its server to be there again.
_RESTART: Final = 30.0

#: Seconds until a process that is interrupted twice, and has no server, has written down what it knows.
_LAST_WORDS: Final = 4.0


class ServerDidNotStartError(OSError):
    """Prefect's temporary server does not start; the message is what it said."""


def start_server() -> None:
    """Where no Prefect server is set, start the temporary one that a flow would start, but out of Ctrl-C's reach.

    Raises:
        ServerDidNotStartError: it ended instead (Prefect would try other ports until its time is up), or did not
            answer in that time.
    """
    if get_current_settings().api.url:
        return
    with temporary_settings(set_defaults=TEMPORARY_SERVER):
        _start_server()


def _start_server() -> None:
    import_module("prefect.server.api.server")
    errors: list[Exception] = []

    def start() -> None:
        _hold_back_ctrl_c()
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


@contextmanager
def interrupted(by: BaseException) -> Iterator[None]:
    """Let a run that was interrupted come to its end within the block, and find its server after that.

    After Ctrl-C, a temporary server that it has ended is started again meanwhile, so that the run's end is recorded. A
    second Ctrl-C does not wait for that. Where nobody handles Ctrl-C, no thread holds the process up.
    """
    if not isinstance(by, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread():
        yield
        return
    _leave_unless_handled()
    lost, twice = threading.Event(), threading.Event()
    reviving = threading.Thread(
        target=copy_context().run, args=(_revive, lost, twice), name="server-restart", daemon=True
    )
    reviving.start()
    try:
        yield
        reviving.join(_RESTART)
    except KeyboardInterrupt:
        twice.set()
        if lost.is_set() and reviving.is_alive():
            _leave_without_server()
        raise


def _revive(lost: threading.Event, twice: threading.Event) -> None:
    """Start the temporary server again, at its address, if it closes; but not for who has interrupted twice."""
    server = _temporary_server()
    if server is None or server.server_process is None:
        return
    until = time.monotonic() + _CLOSING
    while _answers(server):
        if time.monotonic() > until:
            return
        time.sleep(0.1)
    server.server_process.kill()  # it would wait for its connections
    server.server_process.wait()
    lost.set()
    if twice.is_set():
        _leave_without_server()
        return
    _hold_back_ctrl_c()
    server.running = False
    with suppress(Exception), temporary_settings(set_defaults=TEMPORARY_SERVER):
        server.start()


def _answers(server: SubprocessASGIServer) -> bool:
    """Return whether the server takes connections."""
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _leave_without_server() -> None:
    if not _at_a_prompt():
        leave_soon(128 + signal.SIGINT, _LAST_WORDS)  # Prefect would ask for it for minutes


def _at_a_prompt() -> bool:
    """Return whether Ctrl-C ends a command, and not the process."""
    return hasattr(sys, "ps1")


def _hold_back_ctrl_c() -> None:
    """Keep Ctrl-C from what this thread starts: a child inherits which signals are held back."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


@cache
def _leave_unless_handled() -> None:
    """Let an exit after Ctrl-C wait for no threads that wait for their answers, and a further one for nothing."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt) and not _at_a_prompt():
            signal.signal(signal.SIGINT, _leave_at_once)
            leave_soon(128 + signal.SIGINT)
        before(kind, error, trace)

    sys.excepthook = hook


def _leave_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    leave(128 + number)


def leave_soon(status: int, seconds: float = 5.0) -> None:
    """End the process in a few seconds at the latest: a usual exit waits for threads that wait for their answers."""
    leaving = threading.Timer(seconds, leave, [status])
    leaving.daemon = True
    leaving.start()


def _temporary_server() -> SubprocessASGIServer | None:
    loaded: Any = sys.modules.get("prefect.server.api.server")
    server: SubprocessASGIServer | None = loaded and loaded.SubprocessASGIServer()
    return server


def leave(status: int) -> NoReturn:
    """End the process without waiting for its threads: a usual exit waits for all that a task runner has started."""
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
        if (server := _temporary_server()) and server.server_process:
            server.server_process.terminate()
    os._exit(status)
