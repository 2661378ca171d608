"""Processes that are killed again and again while they pay: who may pay twice, and what is left behind."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.integration.chaos import Account
from tests.integration.payers import THREADS, pay_for_all
from tests.s3 import S3Server
from tests.storage.processes import start

pytestmark = pytest.mark.integration

#: Seconds after which what does not end has failed.
PATIENCE = 120.0

FAILURES = {429: 0.03, 503: 0.03, 504: 0.02}


@pytest.fixture
def flaky() -> Iterator[Sandbox]:
    """Answers take 50 to 300 ms; some requests are turned away, some have an unknown outcome."""
    with Sandbox(tiny=True, latency=(0.05, 0.3), fail=FAILURES, seed=4) as sandbox:
        yield sandbox


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_server: S3Server) -> ImageStore:
    """A store of each kind, with a rescue folder of its own."""
    rescue = str(tmp_path / "rescue")
    if request.param == "folder":
        return ImageStore(url=str(tmp_path / "store"), rescue_folder=rescue)
    return ImageStore(url=f"s3://{s3_server.new_bucket()}/art", rescue_folder=rescue, **s3_server.settings())


PROCESSES, REQUESTS, KILLS = 6, 50, 40


def test_six_processes_pay_once_whoever_is_killed(place: ImageStore, flaky: Sandbox) -> None:
    """Of six processes that want the same, one is killed again and again: only for its own claims is paid again."""
    settings = place.model_dump(mode="json", context={"include_secrets": True})
    chance = random.Random(11)  # noqa: S311 - chance, not secrecy
    account, seeds = Account(place, flaky), itertools.count()
    racers: dict[int, BaseProcess] = {}
    for _ in range(KILLS):
        while len(racers) < PROCESSES:
            seed = next(seeds)
            racers[seed] = start(pay_for_all, settings, flaky.base_url, REQUESTS, seed)
        wait_for_calls(flaky, flaky.calls + chance.randint(1, 2), patience=0.5)
        time.sleep(chance.uniform(0, 0.1))
        seed = chance.choice(list(racers))
        racer = racers.pop(seed)
        racer.kill()
        racer.join(PATIENCE)
        account.killed(f"run-{seed}-", in_flight=THREADS)
    for racer in racers.values():
        racer.join(PATIENCE)
        assert racer.exitcode == 0
    account.check(REQUESTS)


def wait_for_calls(sandbox: Sandbox, calls: int, patience: float) -> None:
    """Until so many came, or no more seem to come."""
    end = time.monotonic() + patience
    while sandbox.calls < calls and time.monotonic() < end:
        time.sleep(0.005)
