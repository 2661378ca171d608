"""Runs of the deployments that are told to end in a container, or killed: what is made stays, and the next goes on.

A process namespace stands for a container: the first process in it is the init that the image starts with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefect_ttapi.sandbox import Sandbox
from tests.support.children import until
from tests.support.prefect_server import PATIENCE, PREFECT, ROOT, Server
from tests.support.s3 import S3Server

pytestmark = pytest.mark.integration

REQUESTS = 40
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "tini", "--", sys.executable)
POOL = "stopping"
WORKER = ("deployments/worker.py", "--pool", POOL)
EXECUTE = (PREFECT, "flow-run", "execute")
SETUP = yaml.safe_load((ROOT / "deployments/compose.yaml").read_text(encoding="utf-8"))["services"]["setup"]
#: Seconds after its death within which a run is marked.
MARKED = 90


@dataclass
class Place:
    """Where runs of the deployments work: a server, a sandbox, a store, and the environment of containers."""

    server: Server
    sandbox: Sandbox
    folder: Path
    environment: dict[str, str] = field(repr=False)

    def run(self, deployment: str, **parameters: Any) -> str:
        """A new run of a deployment, by its id."""
        (found,) = self.server.ask("deployments/filter", deployments={"name": {"any_": [deployment]}})
        standard = {"store": self.store(deployment), "deliver": None, "credentials": None, "name": deployment}
        path = f"deployments/{found['id']}/create_flow_run"
        return self.server.ask(path, parameters=standard | parameters)["id"]

    def store(self, deployment: str) -> str:
        return str(self.folder / deployment)

    def flow_run(self, run: str) -> dict[str, Any]:
        (found,) = self.server.ask("flow_runs/filter", flow_runs={"id": {"any_": [run]}})
        return found

    def taken(self, deployment: str) -> int:
        """How many places of a deployment's concurrency limit are taken."""
        (found,) = self.server.ask("deployments/filter", deployments={"name": {"any_": [deployment]}})
        limits = self.server.ask("v2/concurrency_limits/filter")
        (taken,) = (each["active_slots"] for each in limits if each["name"] == f"deployment:{found['id']}")
        return taken

    def is_in_state(self, run: str, *names: str) -> bool:
        return self.flow_run(run)["state_name"] in names

    def told(self, wanted: dict[str, Any]) -> list[str]:
        """What the events of batches say of their being interrupted; the server takes them in after a while."""
        told = self.server.ask("events/filter", filter=wanted)["events"]
        return [event["resource"]["ttapi.interrupted"] for event in told]

    def statuses(self, deployment: str, run: str) -> Counter[str]:
        manifest = Path(self.store(deployment), f"batches/{run}/manifest.jsonl")
        return Counter(json.loads(line)["status"] for line in manifest.read_text().splitlines())

    def paid(self, deployment: str) -> int:
        """How many requests have their images."""
        ledger = Path(self.store(deployment)).glob("ledger/**/*.json")
        return sum('"generated"' in document.read_text() for document in ledger)

    @contextmanager
    def container(self, name: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command as an init's child in a process namespace of its own, which ends with the test."""
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [*CONTAINER, *command], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait(PATIENCE)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def init_of(container: subprocess.Popen[bytes]) -> int:
    """The first process in a container, as this machine numbers it."""
    return int(Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text())


@pytest.fixture(scope="module")
def place(
    prefect_ui: Server, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """What the service `setup` of the compose file makes, with a pool that no other test works for."""
    folder = tmp_path_factory.mktemp("stopping")
    prompts = folder / "prompts.csv"
    prompts.write_text(
        "prompt,model\n" + "".join(f"boat {number},gpt-image-1\n" for number in range(REQUESTS))
    )
    # the blocks `images` are another test's
    script = SETUP["command"][-1].replace("bootstrap", "bootstrap --name composed")
    surroundings = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "TTAPI_API_KEY": "sandbox",
        "AWS_ENDPOINT_URL_S3": s3_server.url,
        "AWS_DEFAULT_REGION": SETUP["environment"]["AWS_DEFAULT_REGION"],
        "AWS_ACCESS_KEY_ID": s3_server.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret_access_key,
    }
    assert surroundings.keys() - {"PATH", "PYTHONPATH"} == SETUP["environment"].keys() - {"PREFECT_API_URL"}
    made = subprocess.run(
        ["sh", "-ec", script],
        cwd=ROOT,
        env=prefect_ui.environment | surroundings,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    prefect_ui.ask("work_pools/", name=POOL, type="process")
    for name in ("nightly", "on-demand"):
        (deployment,) = prefect_ui.ask("deployments/filter", deployments={"name": {"any_": [name]}})
        prefect_ui.send("PATCH", f"deployments/{deployment['id']}", work_pool_name=POOL)
    with Sandbox(tiny=True, latency=0.7) as sandbox:
        environment = prefect_ui.environment | {
            "TTAPI_BASE_URL": sandbox.base_url,
            "TTAPI_API_KEY": "sandbox",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_WEBSERVER_PORT": "0",
            # what a container of a Docker or Kubernetes pool has from the deployment's job variables
            "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule",
        }
        yield Place(prefect_ui, sandbox, folder, environment)


@dataclass(frozen=True)
class Killed:
    """A run that was killed, when that was, and how many requests were paid for and recorded by then."""

    run: str
    at: float
    recorded: int


@pytest.fixture(scope="module")
def killed(place: Place) -> Killed:
    """A nightly run whose machine is gone in the middle of its batch, and its worker with it."""
    run = place.run("nightly", prompts=str(place.folder / "prompts.csv"), max_in_flight=4)
    with place.container("killed", *WORKER) as container:
        until(lambda: place.paid("nightly") >= 4 and place.sandbox.in_flight, place.log("killed"))
        os.kill(init_of(container), signal.SIGKILL)
        container.wait(PATIENCE)
    assert place.taken("nightly") == 1
    return Killed(run, time.time(), place.paid("nightly"))


def test_a_run_goes_on_elsewhere(killed: Killed, place: Place) -> None:
    """Stopped with its container, then with its worker, a run is scheduled again, and pays for each image once."""
    calls = place.sandbox.calls
    run = place.run("on-demand", prompts=[f"tree {number}" for number in range(REQUESTS)], max_in_flight=4)
    containers = {
        "container": (*EXECUTE, run),
        "worker": WORKER,
    }
    for before, (name, command) in enumerate(containers.items()):
        with place.container(name, *command) as container:
            until(
                lambda before=before: place.paid("on-demand") >= 10 * before + 4 and place.sandbox.in_flight,
                place.log(name),
            )
            os.kill(init_of(container), signal.SIGTERM)
            assert container.wait(PATIENCE) == 0, place.log(name).read_text()
        assert place.is_in_state(run, "AwaitingRetry")
        paid = place.paid("on-demand")
        assert place.sandbox.calls - calls == paid < REQUESTS
        statuses = place.statuses("on-demand", run)
        assert statuses["skipped"] == REQUESTS - paid
        wanted = {
            "event": {"name": ["ttapi.batch.completed"]},
            "related": {"id": [f"prefect.flow-run.{run}"]},
        }
        interrupted = ["true"] * (before + 1)
        until(
            lambda wanted=wanted, interrupted=interrupted: place.told(wanted) == interrupted, place.log(name)
        )

    with place.container("last", *EXECUTE, run) as container:
        assert container.wait(PATIENCE) == 0, place.log("last").read_text()
    assert place.is_in_state(run, "Completed")
    assert place.sandbox.calls - calls == REQUESTS == place.statuses("on-demand", run).total()
    assert place.flow_run(run)["run_count"] == 3


def test_a_dead_run_is_marked_and_makes_room(killed: Killed, place: Place) -> None:
    """A run that was killed becomes Crashed in time; the next one starts, and pays for what was not recorded."""
    until(lambda: place.is_in_state(killed.run, "Crashed"), place.server.log)
    marked = datetime.fromisoformat(place.flow_run(killed.run)["state"]["timestamp"]).timestamp()
    assert 30 < marked - killed.at < MARKED
    assert place.taken("nightly") == 0
    calls = place.sandbox.calls
    run = place.run("nightly", prompts=str(place.folder / "prompts.csv"))
    with place.container("next", *EXECUTE, run) as container:
        assert container.wait(PATIENCE) == 0, place.log("next").read_text()
    assert place.is_in_state(run, "Completed"), place.log("next").read_text()
    assert place.sandbox.calls - calls == REQUESTS - killed.recorded
