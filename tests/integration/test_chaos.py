"""Processes that are killed again and again while they pay: who may pay twice, and what is left behind."""

from __future__ import annotations

import itertools
import random
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from prefect_ttapi.ledger.documents import State
from prefect_ttapi.lineage.manifest import Rows
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.chaos import Account, documents
from tests.support.children import child, small_flow, until
from tests.support.payers import THREADS, pay_for_all
from tests.support.prefect_server import PATIENCE, Server
from tests.support.processes import start
from tests.support.s3 import S3Server

pytestmark = pytest.mark.integration

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


BATCH, ONE_OF_EACH = 70, [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def test_a_batch_comes_to_its_end_whoever_kills_it(
    tmp_path: Path, s3_server: S3Server, prefect_ui: Server
) -> None:
    """Killed ten times at any moment, and run again until done: only SIGKILL costs anything, and all is whole.

    Into a folder and to S3 side by side, as starting a process takes longest.
    """
    rescue = str(tmp_path / "rescue")
    places = [
        ImageStore(url=str(tmp_path / "store"), rescue_folder=rescue),
        ImageStore(url=f"s3://{s3_server.new_bucket()}/art", rescue_folder=rescue, **s3_server.settings()),
    ]
    logs = [tmp_path / "folder.log", tmp_path / "s3.log"]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(partial(kill_and_go_on, prefect_ui), places, logs, [7, 8]))


def kill_and_go_on(server: Server, place: ImageStore, log: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - chance, not secrecy
    signals = [*ONE_OF_EACH * 3, signal.SIGKILL]
    moments = ["start", *["work"] * 6, *["end"] * 3]
    with Sandbox(tiny=True, latency=(0.05, 0.3), fail=FAILURES, seed=seed) as sandbox:
        account = Account(place, sandbox)
        for sign, moment in zip(chance.sample(signals, k=10), moments, strict=True):
            while not kill(server, place, sandbox, account, log, sign, moment, chance):
                pass  # it was done before
        for _ in range(5):
            with child(small_flow(place, sandbox, BATCH), server.environment, log) as process:
                if process.wait(PATIENCE) == 0:
                    break
        else:
            raise AssertionError(log.read_text())
        account.check(BATCH)
    rows = list(Rows(lambda: place.open(log.read_text().splitlines()[-1])))
    assert [row.row for row in rows] == list(range(BATCH))
    assert all(row.status in ("generated", "cached") and row.images for row in rows)


def kill(
    server: Server,
    place: ImageStore,
    sandbox: Sandbox,
    account: Account,
    log: Path,
    sign: signal.Signals,
    moment: str,
    chance: random.Random,
) -> bool:
    """Start a run and kill it; whether it still ran then."""
    began = len(sandbox.paid_by_request)
    reached = {"start": began, "work": min(BATCH, began + chance.randint(1, 6)), "end": BATCH}[moment]
    with child(small_flow(place, sandbox, BATCH), server.environment, log) as process:
        until(lambda: len(sandbox.paid_by_request) >= reached or process.poll() is not None, log)
        time.sleep(chance.uniform(0, 0.3) if began < reached else chance.uniform(0, 4))
        process.send_signal(sign)
        status = process.wait(PATIENCE)
    claims = [one for one in documents(place) if one.state is State.CLAIMED]
    held = [one for one in claims if one.holder.pid == process.pid]
    assert sign == signal.SIGKILL or not held, log.read_text()
    run = re.search(r"run ([0-9a-f-]{36})\n", log.read_text())
    assert run or not held, log.read_text()
    if run and sign == signal.SIGKILL:
        account.killed(run[1], in_flight=len(held))
    return status not in (0, 1)


def wait_for_calls(sandbox: Sandbox, calls: int, patience: float) -> None:
    """Until so many came, or no more seem to come."""
    end = time.monotonic() + patience
    while sandbox.calls < calls and time.monotonic() < end:
        time.sleep(0.005)
