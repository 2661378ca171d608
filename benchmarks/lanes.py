"""How much of `max_in_flight` is in use while there is something left to send, and in how many task runs.

    python benchmarks/lanes.py [threads] [processes] [dask] [ray]

160 requests, 32 at once: of one latency, and with one in ten that takes ten times as long; then 10,000 of latency 0 in
threads. The sandbox, asked 50 times a second, tells how many requests are with it. Dask and Ray are measured where
they are installed (`pip install ".[engines]"`).
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="lanes-"))
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from prefect_ttapi import BatchReport, ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.sandbox import Sandbox

IN_FLIGHT = 32
ENGINES = ("threads", "processes", "dask", "ray")


def runner_of(engine: str) -> Any:
    """Return a task runner of this kind."""
    if engine == "dask":
        from prefect_dask import DaskTaskRunner

        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        return DaskTaskRunner(cluster_kwargs=options)
    if engine == "ray":
        from prefect_ray import RayTaskRunner

        return RayTaskRunner(init_kwargs={"num_cpus": 2, "include_dashboard": False})
    return ThreadPoolTaskRunner() if engine == "threads" else ProcessPoolTaskRunner(max_workers=2)


@contextmanager
def watched(sandbox: Sandbox, requests: int) -> Iterator[list[float]]:
    """Note, 50 times a second from the first request to the last one's arrival, how much is in use."""
    used: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            if 0 < sandbox.calls < requests:
                used.append(sandbox.in_flight / IN_FLIGHT)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield used
    finally:
        ended.set()
        thread.join()


def measure(engine: str, latencies: list[float]) -> tuple[float, float, int, int]:
    """Return the part in use, seconds, task runs, and the most in flight."""
    requests = [
        {"prompt": f"tree {number} [[sandbox:latency={latency}]]", "model": "gpt-image-1"}
        for number, latency in enumerate(latencies)
    ]
    with Sandbox(tiny=True) as sandbox, tempfile.TemporaryDirectory() as folder:
        credentials = TTAPICredentials(api_key="sandbox-key", base_url=sandbox.base_url)

        @flow(task_runner=runner_of(engine), persist_result=False)
        def batch() -> BatchReport:
            return generate_batch(
                requests, credentials, ImageStore(url=folder), max_in_flight=IN_FLIGHT, thumbnails=False
            )

        with watched(sandbox, len(requests)) as used:
            report = batch()
        most = sandbox.most_in_flight
    with get_client(sync_client=True) as client:
        runs = FlowRunFilter(id=FlowRunFilterId(any_=[report.flow_run_id]))
        counted = client.request("POST", "/task_runs/count", json={"flow_runs": runs.model_dump(mode="json")})
    return sum(used) / max(1, len(used)), report.seconds, int(counted.json()), most


def main() -> None:
    """Print a line for each load on each engine."""
    asked = sys.argv[1:] or [engine for engine in ENGINES if engine in ("threads", "processes")] + [
        engine for engine in ("dask", "ray") if find_spec(f"prefect_{engine}")
    ]
    equal = [3.0] * 160
    uneven = [10.0 if number % 10 == 5 else 1.0 for number in range(160)]
    loads = [("160 of 3 s", equal), ("160, one in ten takes ten times 1 s", uneven)]
    print(f"{'engine':10} {'load':38} {'in use':>7} {'s':>7} {'task runs':>10} {'most':>5}")
    for engine in asked:
        for name, latencies in loads + ([("10,000 of 0 s", [0.0] * 10_000)] if engine == "threads" else []):
            used, seconds, task_runs, most = measure(engine, latencies)
            print(f"{engine:10} {name:38} {used:7.1%} {seconds:7.1f} {task_runs:10} {most:5}", flush=True)


if __name__ == "__main__":
    main()
