"""A real `prefect server start` with its UI, and commands that run against it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.clocks import until
from tests.support.ports import free_ports

ROOT = Path(__file__).parent.parent.parent
#: The command `prefect` of the environment that the tests run in.
PREFECT = str(Path(sys.executable).with_name("prefect"))
#: Seconds after which a server that does not answer has failed the test.
PATIENCE = 120.0


@dataclass(frozen=True)
class Server:
    """A Prefect server.

    Attributes:
        url: where its UI is.
        environment: of commands that are to use it.
        log: what it says.
        pid: of its process.
    """

    url: str
    environment: dict[str, str] = field(repr=False)
    log: Path
    pid: int

    def run(self, *command: str, cwd: Path = ROOT, **environment: str) -> str:
        """Run a Python command (`-m ...` or a script), which must succeed, and return what it prints."""
        done = subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, **body: Any) -> Any:
        """The server's answer to a query of its API."""
        return self.send("POST", path, **body).json()

    def send(self, method: str, path: str, **body: Any) -> httpx.Response:
        """The server's response to a call of its API, which must succeed."""
        end = time.monotonic() + PATIENCE
        while True:
            address = f"{self.url}/api/{path}"
            answer = httpx.request(method, address, json=body, timeout=PATIENCE, trust_env=False)
            # SQLite on a busy machine: Prefect's client asks again, too
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > end:
                break
            time.sleep(0.2)
        return answer.raise_for_status()

    def state_of(self, flow_run_id: str) -> str:
        """The type of a flow run's state."""
        (run,) = self.ask("flow_runs/filter", flow_runs={"id": {"any_": [flow_run_id]}})
        return run["state_type"]

    def until(self, path: str, **body: Any) -> Any:
        """The first answer that is not empty: what a run tells takes a moment to arrive."""
        return until(lambda: self.ask(path, **body), lambda: f"nothing came: {path} {body}", PATIENCE)


@contextmanager
def prefect_server(home: Path, **settings: str) -> Iterator[Server]:
    """A server of its own on a free port, with its database, its log and what its clients keep below `home`."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    mine = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_UI_URL": url,
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        **settings,
    }
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
    } | mine
    log = home / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, PREFECT, "server", "start"],
            env=environment,
            stdout=out,
            stderr=out,
        )
        try:
            until(lambda: _answers(url, process, log), log.read_text, PATIENCE)
            yield Server(url, environment, log, process.pid)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _answers(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return httpx.get(f"{url}/api/health", trust_env=False).json() is True
    except (httpx.HTTPError, ValueError):
        return False
