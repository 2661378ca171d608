"""Deployments, with a real server, its scheduler and a worker: from a checkout, from git and served; they pay once."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_ttapi import ImageStore
from prefect_ttapi.cli.batches import batch_called, rows_of
from prefect_ttapi.cli.main import main
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
    account: dict[str, str] = field(repr=False)

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

    def bootstrap(self, *words: str, status: int = 0, **environment: str) -> list[str]:
        """What `prefect-ttapi bootstrap ...` says, but for its first line."""
        url = {PREFECT_API_URL: self.server.environment["PREFECT_API_URL"]}
        out = StringIO()
        with (
            temporary_settings(url),
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(out),
        ):
            for name, value in (self.account | environment).items():
                patch.setenv(name, value)
            assert main(["bootstrap", *words]) == status, out.getvalue()
        return out.getvalue().splitlines()[1:]

    def deployment(self, name: str) -> dict[str, Any]:
        (found,) = self.server.ask("deployments/filter", deployments={"name": {"any_": [name]}})
        return found

    def run(self, name: str, **parameters: Any) -> dict[str, Any]:
        """The state in which a run of a deployment ends."""
        made = self.server.ask(
            f"deployments/{self.deployment(name)['id']}/create_flow_run", parameters=parameters
        )
        ended = {
            "id": {"any_": [made["id"]]},
            "state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}},
        }
        (run,) = self.server.until("flow_runs/filter", flow_runs=ended)
        return run

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

    def until_idle(self) -> None:
        """Wait for the runs that are due: one that waits for its turn would meet what is deployed by then."""

        def is_idle() -> bool:
            due = {
                "state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}},
                "expected_start_time": {"before_": datetime.now(UTC).isoformat()},
            }
            return not self.server.ask("flow_runs/filter", flow_runs=due)

        until(is_idle, self.worker_log)

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


def words(told: list[str]) -> set[str]:
    """What became of things: made, changed, left or missing."""
    return {line.split()[0] for line in told}


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
        pool = Pool(server, checkout, sandbox_url, worker_log, account)
        told = pool.bootstrap("--store", str(checkout / "out"))
        assert len(told) >= 5
        assert words(told) == {"made"}
        # the key is in the block
        process = running.enter_context(child(worker, server.environment, worker_log, checkout))
        yield pool
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
    pool.until_idle()

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


def test_bootstrap_can_be_repeated(pool: Pool) -> None:
    """What is there is left; a new key is saved; a block never leads to another store or API, and a pause stays."""
    assert words(pool.bootstrap("--store", str(pool.checkout / "out"))) == {"left"}
    (automation, *_) = pool.server.ask("automations/filter")
    pool.server.send("PATCH", f"automations/{automation['id']}", enabled=False)

    told = pool.bootstrap("--in-flight", "5", TTAPI_API_KEY="another")
    assert [line.split(maxsplit=1)[1] for line in told if words([line]) == {"changed"}] == [
        "credentials block images: api_key",
        "concurrency limit ttapi-account: 16 -> 5",
    ]
    elsewhere = {"TTAPI_STORE": "/srv/elsewhere", "TTAPI_BASE_URL": "https://api.ttapi.io"}
    told = pool.bootstrap(status=1, **elsewhere)
    assert ["paid for again" in line for line in told if words([line]) == {"MISSING"}] == [True, True]
    told = pool.bootstrap("--name", "new", status=1, TTAPI_API_KEY="")
    assert "TTAPI_API_KEY is not set" in told[0]
    # the key of before
    assert words(pool.bootstrap()) == {"changed", "left"}
    paused = [each for each in pool.server.ask("automations/filter") if not each["enabled"]]
    assert [each["id"] for each in paused] == [automation["id"]]


def in_docs(page: str, title: str) -> str:
    """The content of a file on a page about deployments."""
    text = (ROOT / "docs/howto" / page).read_text(encoding="utf-8")
    (block,) = re.findall(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    return block


def test_from_the_installed_package(pool: Pool, tmp_path: Path) -> None:
    """The page's file, prompts and command: its folder is where the prompts are, and no code of a user's is needed."""
    project = yaml.safe_load(in_docs("nightly.md", "prefect.yaml"))
    project["pull"][0]["prefect.deployments.steps.set_working_directory"]["directory"] = str(tmp_path)
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(project))
    (tmp_path / "prompts.csv").write_text(in_docs("nightly.md", "prompts.csv"))
    pool.prefect("--no-prompt", "deploy", "--all", cwd=tmp_path)
    before = pool.calls()
    pool.prefect("deployment", "run", "campaign/nightly", "--watch", cwd=tmp_path)
    assert pool.calls() == before + 3
    assert {path.name for path in tmp_path.iterdir()} == {"prefect.yaml", "prompts.csv"}


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, timeout=PATIENCE)


def test_from_git(pool: Pool, tmp_path: Path) -> None:
    """Prompts come with the clone, the store is the block's, and the next night pays for nothing.

    A relative store, which would be deleted with the clone, is refused before anything is sent.
    """
    repository = tmp_path / "pictures"
    (repository / "flows").mkdir(parents=True)
    (repository / "flows/prompts.csv").write_text("prompt\na fox that only the repository has\n")
    git(repository, "init", "-q", "-b", "main")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "Prompts")
    project = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text(encoding="utf-8"))
    del project["build"]
    project |= yaml.safe_load(in_docs("deploy.md", "pull, from git"))
    project["pull"][0]["prefect.deployments.steps.git_clone"]["repository"] = repository.as_uri()
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(project))
    pool.prefect("--no-prompt", "deploy", "--all", cwd=tmp_path)

    before = pool.calls()
    refused = pool.run("nightly", store="./out")
    assert refused["state_type"] == "FAILED"
    assert "Name a place that stays" in refused["state"]["message"], pool.told()
    assert pool.calls() == before
    for paid in (1, 1):
        run = pool.run("nightly")
        assert run["state_type"] == "COMPLETED", pool.told()
        assert pool.statuses(run).total() == 1
        assert pool.calls() == before + paid


def test_served_by_one_process(pool: Pool, tmp_path: Path) -> None:
    """Without a worker: what a form submits is validated, a batch on demand is made, and nothing is left to retry."""
    log = tmp_path / "serve.log"
    # `serve` leaves a deployment with the work pool that it has
    for found in pool.server.ask("deployments/filter"):
        pool.server.send("DELETE", f"deployments/{found['id']}")
    command = [str(pool.checkout / "deployments/serve.py")]
    with child(command, pool.server.environment, log, tmp_path) as process:
        pool.server.until("deployments/filter", deployments={"name": {"any_": ["hourly"]}})
        pool.server.until("deployments/filter", deployments={"name": {"any_": ["on-demand"]}})
        wrong = {"prompts": ["a fox"], "n": 11}
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            pool.run("on-demand", **wrong)
        run = pool.run("on-demand", prompts=["a served fox", "a served owl"], size="1024x1024")
        assert run["state_type"] == "COMPLETED", pool.told()
        assert pool.statuses(run) == Counter(generated=2)
        retried = pool.run("hourly")
        assert retried["state"]["message"] == "Nothing is to be asked for again."
        process.terminate()
        process.wait(PATIENCE)
