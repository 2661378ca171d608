"""A real `prefect server start` with its UI, and commands that run against it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent.parent
#: Seconds after which a server that does not answer has failed the test.
PATIENCE = 120.0


@dataclass(frozen=True)
class Server:
    """A Prefect server.

    Attributes:
        url: where its UI is.
        environment: of commands that are to use it.
    """

    url: str
    environment: dict[str, str] = field(repr=False)

    def run(self, *command: str, **environment: str) -> str:
        """What a Python command (`-m ...`) prints; it must succeed."""
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, **body: Any) -> Any:
        """The server's answer to a query of its API."""
        answer = httpx.post(f"{self.url}/api/{path}", json=body, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    def until(self, path: str, **body: Any) -> Any:
        """The first answer that is not empty: what a run tells takes a moment to arrive."""
        end = time.monotonic() + PATIENCE
        while not (found := self.ask(path, **body)):
            assert time.monotonic() < end, f"nothing came: {path} {body}"
            time.sleep(0.2)
        return found


@contextmanager
def prefect_server(home: Path) -> Iterator[Server]:
    """A server of its own on a free port, with its database and all that its clients keep below `home`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    mine = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_UI_URL": url,
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
    } | mine
    log = home / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=out,
            stderr=out,
        )
        try:
            _wait_for(url, process, log)
            yield Server(url, environment)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        try:
            if httpx.get(f"{url}/api/health", trust_env=False).json() is True:
                return
        except (httpx.HTTPError, ValueError):
            pass
        time.sleep(0.2)
