"""One batch on every engine that people have: the same report, each request paid once, the key in no log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prefect import flow
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from prefect_ttapi import BatchReport, Budget, ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.sandbox import Sandbox

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("prefect_server")]

ENGINES = ["threads", "processes", "dask", "ray"]
KEY = "sandbox-key-that-nobody-may-see"


@contextmanager
def runner_of(engine: str) -> Iterator[Any]:
    """A task runner of this kind, and whatever it needs running."""
    if engine == "threads":
        yield ThreadPoolTaskRunner()
    elif engine == "processes":
        yield ProcessPoolTaskRunner(max_workers=2)
    elif engine == "dask":
        dask = pytest.importorskip("prefect_dask", reason="make integration installs it")
        yield dask.DaskTaskRunner(
            cluster_kwargs={"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        )
    else:
        ray = pytest.importorskip("prefect_ray", reason="make integration installs it")
        yield ray.RayTaskRunner(init_kwargs={"num_cpus": 2, "include_dashboard": False})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("default")  # of the engines' own
def test_a_batch_is_the_same_on_each_engine(
    engine: str, tmp_path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """Never more than `max_in_flight` at the server, duplicates paid once, refused rows failed, the budget kept."""
    store = ImageStore(url=str(tmp_path / "store"))
    shop = ImageStore(url=str(tmp_path / "shop"))
    with Sandbox(tiny=True, latency=0.2, api_key=KEY) as sandbox, runner_of(engine) as runner:
        credentials = TTAPICredentials(api_key=KEY, base_url=sandbox.base_url)
        requests = [{"prompt": f"tree {number % 30}", "model": "gpt-image-1"} for number in range(36)]
        requests[7] = {"prompt": "[[sandbox:moderation]]", "model": "gpt-image-1"}

        @flow(task_runner=runner, persist_result=False)
        def batch() -> BatchReport:
            return generate_batch(
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

        report = batch()
        statuses = [row.status for row in report.rows]
        assert sandbox.most_in_flight <= 6
        assert (sandbox.paid, report.totals.images - report.totals.images_cached) == (27, 27)
    assert statuses[7] == "failed"
    assert report.rows[7].error_type == "ModerationError"
    assert statuses.count("generated") == 27
    assert statuses.count("failed") == 1
    assert statuses.count("skipped") == len(
        [row for row in report.rows if row.error_type == "BudgetExceeded"]
    )
    assert len(list((tmp_path / "shop").glob("*.png"))) == statuses.count("generated") + statuses.count(
        "cached"
    )
    told = capfd.readouterr()
    assert KEY not in told.out + told.err + caplog.text


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("default")  # of the engines' own
def test_a_limit_in_tokens_is_held_on_each_engine(engine: str, tmp_path):
    """A lane takes along what is reserved for it: the limit is used as far as it goes, and not passed."""
    with Sandbox(tiny=True, latency=0.1, api_key=KEY) as sandbox, runner_of(engine) as runner:
        credentials = TTAPICredentials(api_key=KEY, base_url=sandbox.base_url)

        @flow(task_runner=runner, persist_result=False)
        def batch() -> BatchReport:
            return generate_batch(
                [{"prompt": f"tree {number:02}", "model": "gpt-image-1"} for number in range(24)],
                credentials,
                ImageStore(url=str(tmp_path)),
                max_in_flight=8,
                budget=Budget(tokens=42_000),
                raise_on_failure=False,
            )

        report = batch()
    each = report.rows[0].usage.total_tokens
    assert report.totals.total_tokens == 42_000 // each * each
    assert report.totals.generated == sandbox.paid == 42_000 // each
    assert report.notes == ()
