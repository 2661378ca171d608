"""One batch on every engine that people have: the same report, each request paid once, the key nowhere to be seen."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from prefect_ttapi import BatchReport, Budget, ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.layout import LEDGER
from tests.support.children import child, until
from tests.support.ports import free_ports
from tests.support.prefect_server import PATIENCE, ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.filterwarnings("default"),  # of the engines' own
]

KEY = "sandbox-key-that-nobody-may-see"

#: Pages of Ray's dashboard, which builds what people see from them in the browser.
RAY_PAGES = [
    "/",
    "/api/cluster_status",
    "/api/jobs/",
    "/api/v0/nodes?detail=1",
    "/api/v0/objects?detail=1",
    "/api/v0/runtime_envs?detail=1",
    "/api/v0/tasks/summarize",
    "/api/v0/tasks/timeline",
    "/api/v0/tasks?detail=1",
    "/api/v0/workers?detail=1",
    "/logical/actors",
    "/nodes?view=details",
    "/nodes?view=summary",
]


@dataclass
class Engine:
    """An engine at work.

    Attributes:
        name: of it.
        runner: the task runner of a flow on it.
        dashboards: where its pages are.
        pages: of these, those that no other page leads to.
        logs: what its processes say.
    """

    name: str
    runner: Any
    dashboards: list[str] = field(default_factory=list)
    pages: list[str] = field(default_factory=lambda: ["/"])
    logs: Path | None = None


@contextmanager
def dask_cluster(folder: Path) -> Iterator[Engine]:
    """A cluster that a flow's own process starts."""
    prefect_dask = pytest.importorskip("prefect_dask", reason="make integration installs it")
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        runner = prefect_dask.DaskTaskRunner(address=cluster.scheduler_address)
        yield Engine("dask", runner, [cluster.dashboard_link.removesuffix("/status")], ["/", "/sitemap.json"])


@contextmanager
def dask_processes(folder: Path) -> Iterator[Engine]:
    """A scheduler, and two workers with one thread each, as on machines of their own."""
    prefect_dask = pytest.importorskip("prefect_dask", reason="make integration installs it")
    ports = free_ports(4)
    scheduler = f"tcp://127.0.0.1:{ports[0]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    host = ["--host", "127.0.0.1"]
    with ExitStack() as stack:

        def start(name: str, *command: str) -> None:
            log = folder / f"{name}.log"
            stack.enter_context(
                child(["-m", "distributed.cli." + command[0], *command[1:]], environment, log)
            )

        pages = ["--dashboard-address", f"127.0.0.1:{ports[1]}"]
        start("scheduler", "dask_scheduler", *host, "--port", str(ports[0]), *pages)
        for number in (2, 3):
            pages = ["--dashboard-address", f"127.0.0.1:{ports[number]}"]
            start(
                f"worker-{number}", "dask_worker", scheduler, *host, "--nthreads", "1", "--no-nanny", *pages
            )
        logs = [folder / f"worker-{number}.log" for number in (2, 3)]
        until(lambda: all("Registered to" in log.read_text() for log in logs), logs[0])
        dashboards = [f"http://127.0.0.1:{port}" for port in ports[1:]]
        runner = prefect_dask.DaskTaskRunner(address=scheduler)
        yield Engine("dask-processes", runner, dashboards, ["/", "/sitemap.json"], logs=folder)


@contextmanager
def ray_cluster(folder: Path) -> Iterator[Engine]:
    prefect_ray = pytest.importorskip("prefect_ray", reason="make integration installs it")
    import ray

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        environment.setenv("PYTHONPATH", str(ROOT))
        context = ray.init(num_cpus=2, namespace="prefect", include_dashboard=True)
        try:
            logs = Path(context.address_info["session_dir"]) / "logs"
            dashboards = [f"http://{context.dashboard_url}"]
            yield Engine("ray", prefect_ray.RayTaskRunner(), dashboards, RAY_PAGES, logs=logs)
        finally:
            ray.shutdown()


@contextmanager
def threads(folder: Path) -> Iterator[Engine]:
    yield Engine("threads", ThreadPoolTaskRunner())


@contextmanager
def processes(folder: Path) -> Iterator[Engine]:
    yield Engine("processes", ProcessPoolTaskRunner(max_workers=2))


ENGINES = [threads, processes, dask_cluster, dask_processes, ray_cluster]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda start: start.__name__)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Each engine, started once for all tests."""
    with request.param(tmp_path_factory.mktemp("engine")) as running:
        yield running


def pages_of(engine: Engine) -> dict[str, str]:
    """Each page of the engine's dashboards that answers, by address: those we know, and what they link to."""
    told: dict[str, str] = {}
    with httpx.Client(timeout=PATIENCE, trust_env=False, follow_redirects=True) as client:
        for dashboard in engine.dashboards:
            ahead = [dashboard + page for page in engine.pages]
            while ahead and len(told) < 200:
                address = ahead.pop()
                if address in told or "statestream" in address:
                    continue
                try:
                    answer = client.get(address)
                except httpx.HTTPError:
                    continue
                told[address] = answer.text if answer.is_success else ""
                links = re.findall(r"""(?:href|src)=["']([^"'#]+)""", answer.text)
                if address.endswith("/sitemap.json"):
                    links += [path for path in answer.json()["paths"] if ":" not in path and "(" not in path]
                joined = (str(httpx.URL(address).join(link)) for link in links)
                ahead += [link for link in joined if link.startswith(dashboard + "/")]
    return {address: text for address, text in told.items() if text}


def test_a_batch_is_the_same_on_each_engine(
    engine: Engine, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """Never more in flight than asked for, and as many; each paid once; budgets and the rate kept; the key unseen."""
    store = ImageStore(url=str(tmp_path / "store"))
    shop = ImageStore(url=str(tmp_path / "shop"))
    requests = [
        {"prompt": f"tree {number % 30} [[sandbox:latency=0.3]]", "model": "gpt-image-1"}
        for number in range(36)
    ]
    requests[7] = {"prompt": "[[sandbox:moderation]]", "model": "gpt-image-1"}
    slow = [{"prompt": f"oak {number} [[sandbox:latency=1]]", "model": "gpt-image-1"} for number in range(18)]
    dear = [{"prompt": f"elm {number:02}", "model": "gpt-image-1"} for number in range(24)]
    paced = [{"prompt": f"fir {number}", "model": "gpt-image-1"} for number in range(12)]
    with Sandbox(tiny=True, api_key=KEY) as sandbox, ThreadPoolExecutor() as beside:
        credentials = TTAPICredentials(api_key=KEY, base_url=sandbox.base_url)

        @flow(task_runner=engine.runner, persist_result=False)
        def batches() -> tuple[BatchReport, ...]:
            same = generate_batch(
                requests,
                credentials,
                store,
                deliver_to=shop,
                key="{number}.{ext}",
                values=[{"number": number} for number in range(36)],
                max_in_flight=6,
                budget=Budget(images=27),
                raise_on_failure=False,
            )
            others: tuple[tuple[list[Any], dict[str, Any]], ...] = (
                (slow, {"max_in_flight": 9}),
                (dear, {"budget": Budget(tokens=42_000)}),
                (paced, {"rate_limit": 240, "max_in_flight": 4}),
            )
            return same, *(
                generate_batch(some, credentials, store, raise_on_failure=False, **options)
                for some, options in others
            )

        def look() -> dict[str, str]:
            end = time.monotonic() + PATIENCE
            while sandbox.calls < 27 + 9 and time.monotonic() < end:
                time.sleep(0.05)
            return pages_of(engine)

        pages = beside.submit(look)
        same, wide, limited, even = batches()
        calls, most = sandbox.calls, sandbox.most_in_flight
    statuses = [row.status for row in same.rows]
    assert (statuses[7], same.rows[7].error_type) == ("failed", "ModerationError")
    assert (statuses.count("generated"), statuses.count("failed")) == (27, 1)
    over = [row for row in same.rows if row.error_type == "BudgetExceeded"]
    assert statuses.count("skipped") == len(over)
    delivered = len(list((tmp_path / "shop").glob("*.png")))
    assert delivered == statuses.count("generated") + statuses.count("cached")
    assert (wide.totals.generated, most) == (18, 9)
    each = limited.rows[0].usage.total_tokens
    assert limited.totals.total_tokens == 42_000 // each * each
    assert limited.notes == ()
    assert even.totals.generated == 12
    assert even.seconds >= 11 * 60 / 240 - 0.1
    assert calls == 28 + 18 + limited.totals.generated + 12
    seen = pages.result()
    if engine.name == "ray":
        tasks = next(text for page, text in seen.items() if "/tasks?detail" in page)
        assert '"CPU": 0.1' in tasks
    assert len(seen) >= 5 * len(engine.dashboards)
    logs = [path.read_text(errors="replace") for path in (engine.logs or tmp_path).rglob("*.log")]
    logs += [path.read_text(errors="replace") for path in (engine.logs or tmp_path).glob("worker-*.[eo]*")]
    told = capfd.readouterr()
    for text in (told.out, told.err, caplog.text, *logs, *seen.values()):
        assert KEY not in text


def claims(store: Path) -> list[dict[str, Any]]:
    """The documents of the ledger that are claims."""
    found = []
    for path in (store / LEDGER).rglob("*.json"):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue  # just being replaced
    return [document for document in found if document.get("state") == "claimed"]


def test_a_worker_that_is_killed_costs_what_it_had_in_flight(engine: Engine, tmp_path: Path):
    """What it had sent is said to be perhaps paid for; all else has its images, and nothing is sent twice."""
    if engine.name in ("threads", "dask"):
        pytest.skip("its threads are ours" if engine.name == "threads" else "the same as the next")
    with Sandbox(tiny=True, api_key=KEY, latency=1.0) as sandbox, ThreadPoolExecutor() as beside:
        credentials = TTAPICredentials(api_key=KEY, base_url=sandbox.base_url)
        requests = [{"prompt": f"ash {number}", "model": "gpt-image-1"} for number in range(32)]
        store = ImageStore(url=str(tmp_path / "store"))

        @flow(task_runner=engine.runner, persist_result=False)
        def batch() -> BatchReport:
            # both processes have started before one is killed, and have recorded something
            first = [{"prompt": f"yew {number}", "model": "gpt-image-1"} for number in range(8)]
            generate_batch(first, credentials, store, max_in_flight=8)
            return generate_batch(
                requests,
                credentials,
                store,
                max_in_flight=8,
                raise_on_failure=False,
                budget=Budget(images=32),
            )

        def kill() -> int:
            end = time.monotonic() + PATIENCE
            while (sandbox.calls < 8 + 14 or sandbox.in_flight < 8) and time.monotonic() < end:
                time.sleep(0.02)
            pid = claims(tmp_path / "store")[0]["holder"]["pid"]
            os.kill(pid, signal.SIGKILL)
            return pid

        killed = beside.submit(kill)
        report = batch()
        assert killed.result() != os.getpid()
        calls = sandbox.calls
    lost = [row for row in report.rows if row.status != "generated"]
    # a pool of processes dies with one of them
    assert 1 <= len(lost) <= (8 if engine.name == "processes" else 4)
    assert all(row.status == "failed" and row.maybe_paid and "perhaps" in (row.error or "") for row in lost)
    assert calls == 8 + 32
    assert report.totals.generated == 32 - len(lost)
    assert report.totals.skipped == 0
