"""Child processes of the tests that kill, interrupt and cancel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support import clocks
from tests.support.prefect_server import PATIENCE, ROOT


@contextmanager
def child(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    cwd: Path = ROOT,
    prefix: Sequence[str] = (),
    **options: object,
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python command that doesn't outlive the test; what it says goes to `log`. `prefix` says where it runs."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [*prefix, sys.executable, *command], cwd=cwd, env=environment, stdout=out, stderr=out, **options
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE)


def small_flow(
    place: ImageStore, sandbox: Sandbox, requests: int, *mode: str, **options: object
) -> list[str]:
    """The command that generates so many images in a small flow."""
    store = place.model_dump(mode="json", context={"include_secrets": True})
    settings = {"store": store, "base_url": sandbox.base_url, "requests": requests} | options
    return ["-m", "tests.support.small_flow", json.dumps(settings), *mode]


def until(what: Callable[[], object], log: Path) -> None:
    """Wait for something to become true."""
    clocks.until(what, log.read_text, PATIENCE)
