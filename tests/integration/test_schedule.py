"""A deployment with a schedule: the server's own scheduler makes the runs, a worker runs them, and they pay once."""

from __future__ import annotations

import csv
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_ttapi import ImageStore
from prefect_ttapi.cli.batches import batch_called, rows_of
from tests.support.children import child, until
from tests.support.prefect_server import PATIENCE, PREFECT, ROOT, Server, prefect_server

pytestmark = pytest.mark.integration

DEPLOY = ("--no-prompt", "deploy", "--all", "--prefect-file")
#: Seconds from one scheduled run to the next.
INTERVAL = 15
ARTIFACTS = {"batch-nightly", "batch-nightly-images", "batch-nightly-progress"}


@dataclass(frozen=True)
class Pool:
    """A server, the worker of the pool `images`, and a sandbox, each a process of its own."""

    server: Server
    checkout: Path
    sandbox_url: str
    worker_log: Path

    def calls(self) -> int:
        """Calls that reached the sandbox so far."""
        return httpx.get(f"{self.sandbox_url}/stats", timeout=PATIENCE, trust_env=False).json()["calls"]

    def prefect(self, *words: str, cwd: Path | None = None, **environment: str) -> str:
        """What `prefect ...` prints, in the checkout's folder where nothing else is said."""
        return self.server.run(PREFECT, *words, cwd=cwd or self.checkout, **environment)

    def statuses(self, run: dict[str, Any]) -> Counter[str]:
        """How many rows of a run's batch have each status."""
        store = ImageStore(url=str(self.checkout / "out"))
        return Counter(row.status for row in rows_of(store, batch_called(store, run["id"])))

    def completed(self, expected: int) -> list[dict[str, Any]]:
        """The completed runs of `nightly`, the earliest first, once there are so many; none may have failed."""
        end = time.monotonic() + PATIENCE
        while True:
            runs = self.server.ask(
                "flow_runs/filter",
                deployments={"name": {"any_": ["nightly"]}},
                flow_runs={"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}},
                sort="START_TIME_ASC",
            )
            assert {run["state_type"] for run in runs} <= {"COMPLETED"}, self.told()
            if len(runs) >= expected:
                return runs
            assert time.monotonic() < end, self.told()
            time.sleep(0.5)

    def errors(self) -> list[str]:
        """What the server logged as errors."""
        records = re.split(r"^(?=\d\d:\d\d:\d\d\.\d{3} \| )", self.server.log.read_text(), flags=re.MULTILINE)
        # SQLite on a busy machine: the answer is 503, and Prefect's client asks again
        return [
            each
            for each in records
            if re.match(r"\S+ \| (ERROR|CRITICAL)", each) and "database is locked" not in each
        ]

    def told(self) -> str:
        """What server and worker said, for a test that fails."""
        return f"server:\n{self.server.log.read_text()}\nworker:\n{self.worker_log.read_text()}"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """What the documentation starts, in a folder that holds what a checkout holds."""
    home, checkout = tmp_path_factory.mktemp("prefect"), tmp_path_factory.mktemp("checkout")
    for folder in ("flows", "deployments"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    sandbox_log, worker_log = home / "sandbox.log", home / "worker.log"
    sandbox = ["-m", "prefect_ttapi", "sandbox", "--port", "0", "--tiny"]
    worker = [PREFECT, "worker", "start", "--pool", "images", "--type", "process"]
    with ExitStack() as running:
        server = running.enter_context(prefect_server(home))
        running.enter_context(child(sandbox, server.environment, sandbox_log))
        until(lambda: "TTAPI_API_KEY" in sandbox_log.read_text(), sandbox_log)
        [sandbox_url] = re.findall(r"TTAPI_BASE_URL=(\S+)", sandbox_log.read_text())
        account = {"TTAPI_BASE_URL": sandbox_url, "TTAPI_API_KEY": "sandbox"}
        process = running.enter_context(child(worker, server.environment | account, worker_log, checkout))
        until(lambda: server.ask("work_pools/filter"), worker_log)
        yield Pool(server, checkout, sandbox_url, worker_log)
        process.terminate()
        process.wait(PATIENCE)


def test_the_schedule_itself_makes_the_runs(pool: Pool) -> None:
    """The server's own scheduler makes each run: the first pays for every prompt, the next one pays for nothing."""
    pool.prefect(*DEPLOY, "deployments/prefect.yaml")
    every = ("--interval", str(INTERVAL), "--replace", "-y")
    pool.prefect("deployment", "schedule", "create", "campaign/nightly", *every)
    pool.completed(1)
    paid = pool.calls()
    first, second, *_ = pool.completed(2)
    pool.prefect("deployment", "schedule", "clear", "campaign/nightly", "-y")

    assert first["auto_scheduled"]
    assert second["auto_scheduled"]
    with (pool.checkout / "flows/prompts.csv").open() as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    assert paid == len(set(prompts)) == pool.calls()
    assert pool.statuses(first) == Counter(generated=paid, cached=len(prompts) - paid)
    assert pool.statuses(second) == Counter(cached=len(prompts))
    # what changed nothing shows no images again
    for run, keys in ((first, ARTIFACTS), (second, ARTIFACTS - {"batch-nightly-images"})):
        shown = pool.server.ask("artifacts/filter", flow_runs={"id": {"any_": [run["id"]]}})
        assert {artifact["key"] for artifact in shown} == keys
    assert not pool.errors()


def test_a_deployment_made_elsewhere_runs_in_the_checkout(pool: Pool, tmp_path: Path) -> None:
    """Neither the folder in which `prefect deploy` runs nor the environment's PWD decides where the runs work."""
    elsewhere = {
        "cwd": tmp_path,
        "PWD": "/nowhere",
        "PYTHONPATH": os.pathsep.join([str(pool.checkout), *sys.path]),
    }
    pool.prefect(*DEPLOY, str(pool.checkout / "deployments/prefect.yaml"), **elsewhere)
    done = len(pool.completed(0))
    pool.prefect("deployment", "run", "campaign/nightly")
    *_, run = pool.completed(done + 1)
    assert sum(pool.statuses(run).values()) > 0
    assert not list(tmp_path.iterdir())
