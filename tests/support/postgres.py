"""A PostgreSQL of Debian's package, for a Prefect server."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.clocks import PATIENCE, until


def _programs() -> Path:
    """Where Debian has them, by version; the newest one's."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: float(each.parent.name))
    assert versions, "there is no PostgreSQL: install Debian's package postgresql"
    return versions[-1]


@contextmanager
def postgres() -> Iterator[str]:
    """An empty database of its own, on a socket in a folder of its own; gives its address for Prefect.

    PostgreSQL refuses to run as root: then it runs as the package's user.
    """
    programs, user = _programs(), "postgres" if os.geteuid() == 0 else getpass.getuser()
    other = ["--reuid", user, "--regid", user, "--clear-groups"] if os.geteuid() == 0 else []
    as_user = ["setpriv", *other, "--pdeathsig", "KILL"]
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        shutil.chown(name, user)
        data = f"{name}/data"
        make = [*as_user, programs / "initdb", "--pgdata", data, "--username", "prefect", "--auth", "trust"]
        subprocess.run([*make, "--no-sync", "--encoding", "UTF8"], cwd=name, capture_output=True, check=True)
        # no TCP; and what is lost when the machine fails is of no use to anyone
        options = ["-D", data, "-k", name, "-c", "listen_addresses=", "-c", "fsync=off"]
        with Path(name, "log").open("w") as log:
            server = subprocess.Popen(
                [*as_user, programs / "postgres", *options], cwd=name, stdout=log, stderr=log
            )
        try:
            ask, log = [programs / "pg_isready", "--host", name], Path(name, "log")
            until(lambda: _answers(server, ask, log), log.read_text)
            yield f"postgresql+asyncpg://prefect@/postgres?host={name}"
        finally:
            server.send_signal(signal.SIGINT)  # a server that is asked by SIGTERM waits for its clients
            server.wait(PATIENCE)


def _answers(server: subprocess.Popen[bytes], ask: list[str | Path], log: Path) -> bool:
    assert server.poll() is None, log.read_text()
    return subprocess.run(ask, capture_output=True).returncode == 0
