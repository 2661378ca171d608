"""What each engine makes of `max_in_flight` and `rate_limit`, beside threads, in one run.

    python benchmarks/lanes.py [threads] [processes] [dask] [ray] [many]

On each engine one flow runs a first small batch, for which the engine starts its processes and these import all that
they need, and then: 64 requests of 1 s, 32 at once; 160, 32 at once, of which one in ten takes ten times as long as the
others; 20 of 1 s under a limit of 60 a minute. The sandbox, asked 50 times a second, tells how many requests are with
it while there is something left to send. Dask and Ray are measured where they are installed
(`pip install ".[engines]"`), each with two processes of one thread. `many` are 10,000 requests of 0 s in threads, for
the number of task runs that they take.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner
from prefect.testing.utilities import prefect_test_harness

from prefect_ttapi import BatchReport, ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.sandbox import Sandbox

ENGINES = ("threads", "processes", "dask", "ray")


@dataclass(frozen=True)
class Load:
    name: str
    latencies: list[float]
    options: dict[str, Any]

    @property
    def requests(self) -> list[dict[str, str]]:
        return [
            {"prompt": f"{self.name} {number} [[sandbox:latency={latency}]]", "model": "gpt-image-1"}
            for number, latency in enumerate(self.latencies)
        ]


FIRST = Load("the first batch", [0.5] * 32, {"max_in_flight": 32})
LOADS = [
    Load("64 of 1 s, 32 in flight", [1.0] * 64, {"max_in_flight": 32}),
    Load(
        "160, one in ten of 10 s", [10.0 if n % 10 == 5 else 1.0 for n in range(160)], {"max_in_flight": 32}
    ),
    Load("20 at 60 a minute", [1.0] * 20, {"rate_limit": 60}),
]
MANY = Load("10,000 of 0 s", [0.0] * 10_000, {"max_in_flight": 32})


def runner_of(engine: str) -> Any:
    """Return a task runner of this kind."""
    if engine == "dask":
        from prefect_dask import DaskTaskRunner

        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
        return DaskTaskRunner(cluster_kwargs=options)
    if engine == "ray":
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(init_kwargs={"num_cpus": 2, "include_dashboard": False, "log_to_driver": False})
    return ProcessPoolTaskRunner(max_workers=2) if engine == "processes" else ThreadPoolTaskRunner()


@contextmanager
def watched(sandbox: Sandbox) -> Iterator[list[tuple[int, int]]]:
    """Note, 50 times a second, how many requests have come, and how many are there."""
    seen: list[tuple[int, int]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            seen.append((sandbox.calls, sandbox.in_flight))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def measure(engine: str, loads: list[Load]) -> Iterator[tuple[Load, BatchReport, float | None]]:
    """Yield each load, its report, and the part of `max_in_flight` that was in use, where no rate limits it."""
    with Sandbox(tiny=True) as sandbox, tempfile.TemporaryDirectory() as folder, watched(sandbox) as seen:
        credentials = TTAPICredentials(api_key="sandbox-key", base_url=sandbox.base_url)
        batches = [(load.requests, load.options) for load in loads]

        @flow(task_runner=runner_of(engine), persist_result=False)
        def one_after_the_other() -> list[BatchReport]:
            store = ImageStore(url=folder)
            return [
                generate_batch(requests, credentials, store, thumbnails=False, **options)
                for requests, options in batches
            ]

        first = 0
        for load, report in zip(loads, one_after_the_other(), strict=True):
            last = first + len(load.latencies)
            most = load.options.get("max_in_flight")
            used = [there / most for came, there in seen if first < came < last] if most else []
            yield load, report, sum(used) / len(used) if used else None
            first = last


def task_runs(report: BatchReport) -> int:
    """Return how many task runs the flow of a batch had."""
    with get_client(sync_client=True) as client:
        runs = FlowRunFilter(id=FlowRunFilterId(any_=[report.flow_run_id]))
        counted = client.request("POST", "/task_runs/count", json={"flow_runs": runs.model_dump(mode="json")})
    return int(counted.json())


def main() -> None:
    """Print a line for each load on each engine."""
    asked = sys.argv[1:] or [
        engine for engine in ENGINES if find_spec(f"prefect_{engine}") or engine in ("threads", "processes")
    ]
    threads: dict[str, float] = {}
    print(f"{'engine':10} {'load':26} {'in use':>7} {'s':>7} {'to threads':>10}")
    for engine in asked:
        for load, report, used in measure(engine, [MANY] if engine == "many" else [FIRST, *LOADS]):
            if engine == "threads":
                threads[load.name] = report.seconds
            share = f"{used:7.1%}" if used is not None else " " * 7
            ratio = f"{report.seconds / threads[load.name]:10.2f}" if load.name in threads else " " * 10
            print(f"{engine:10} {load.name:26} {share} {report.seconds:7.1f} {ratio}", flush=True)
            if engine == "many":
                print(f"task runs: {task_runs(report)}")


if __name__ == "__main__":
    with prefect_test_harness(server_startup_timeout=120):
        main()
