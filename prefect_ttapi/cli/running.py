"""Parts of command lines that run a flow: credentials by name, exit statuses, errors as one line, Ctrl-C, SIGTERM."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, cast
from urllib.parse import unquote, urlsplit

from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import get_current_settings, temporary_settings

from prefect_ttapi.batch import BatchReport
from prefect_ttapi.cli.reporting import Loudness, complain, loudness
from prefect_ttapi.credentials import ContentCredentialsSigner, TTAPICredentials
from prefect_ttapi.errors import SigningError, StoreError, TTAPIError
from prefect_ttapi.generation.provenance import Provenance
from prefect_ttapi.generation.temporary_server import TEMPORARY_SERVER, leave, leave_soon
from prefect_ttapi.lineage.shown import one_line
from prefect_ttapi.sandbox import Sandbox


def credentials_of(block: TTAPICredentials | str | None) -> TTAPICredentials:
    """Return the block, or the saved one of this name, else what the environment says."""
    if isinstance(block, TTAPICredentials):
        return block
    if not block:
        return TTAPICredentials.from_env()
    with temporary_settings(set_defaults=TEMPORARY_SERVER):
        return cast(
            TTAPICredentials, TTAPICredentials.load(block)
        )  # which could also be awaited, where a loop runs


def provenance_of(mark: bool, signer: ContentCredentialsSigner | str | None) -> Provenance | None:
    """Return what delivered files get; None where they get nothing.

    Args:
        mark: mark copies.
        signer: a block, or the name of a saved one, to sign with, too.
    """
    if isinstance(signer, str):
        with temporary_settings(set_defaults=TEMPORARY_SERVER):
            signer = cast(ContentCredentialsSigner, ContentCredentialsSigner.load(signer))
    return Provenance(sign=signer) if mark or signer else None


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


def place(uri: str) -> str:
    """Return an address as a person opens it: a path for a file of this machine."""
    parts = urlsplit(uri)
    if parts.scheme != "file":
        return uri
    path = Path(unquote(parts.path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def run_url(flow_run_id: str) -> str:
    """Return where the Prefect UI shows a run; without a server of its own, how to get one."""
    ui = get_current_settings().ui_url
    if ui:
        return f"{ui.rstrip('/')}/runs/flow-run/{flow_run_id}"
    home = f"PREFECT_HOME={shlex.quote(os.environ['PREFECT_HOME'])} " if "PREFECT_HOME" in os.environ else ""
    return f"`{home}prefect server start`, then http://127.0.0.1:4200/runs/flow-run/{flow_run_id}"


def failures(report: BatchReport, names: Sequence[str] = (), most: int = 20) -> Iterator[str]:
    """Return a line for each row without its images, the first `most` of them.

    Args:
        names: what each request is called; else it has its number.
    """
    bad = (row for row in report.rows if row.status in ("failed", "skipped"))
    for row in islice(bad, most):
        where = names[row.row] if row.row < len(names) else f"request {row.row}"
        name = f" ({one_line(known, 60)})" if (known := row.values.get("name")) else ""
        yield f"{where}{name} {row.status}: {row.error}"
    more = report.totals.failed + report.totals.skipped - most
    if more > 0:
        yield f"and {more} more, in the manifest"


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


def exit_status(main: Callable[[], int]) -> int:
    """Run `main`; return its status, 2 where input, store or credentials are wrong, 130 after Ctrl-C."""
    quiet_logs()
    try:
        with interruptible(), temporary_settings(set_defaults=TEMPORARY_SERVER):
            return main()
    except (ValueError, OSError, StoreError, SigningError, TTAPIError) as error:
        complain(error)
        return 2
    except Interrupted as interruption:
        print(
            "interrupted: what was answered in time is in the store, and the next run goes on from there",
            file=sys.stderr,
        )
        leave_soon(interruption.exit_status)
        return interruption.exit_status


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
