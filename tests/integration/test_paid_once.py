"""What Prefect's retries, refreshes and later runs may cost: calls are counted at the server."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE, temporary_settings

from prefect_ttapi import (
    AuthenticationError,
    BatchError,
    BatchReport,
    Budget,
    ImageRequest,
    ImageStore,
    TTAPICredentials,
    UnknownOutcomeError,
    generate_batch,
    generate_images,
)
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.sandbox import Sandbox
from tests.support.ledgers import acquire

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("prefect_server")]

REQUEST = ImageRequest(prompt="a toll bridge", model="gpt-image-1")
TIMED_OUT = ImageRequest(prompt="[[sandbox:status=504]] [[sandbox:times=1]] a ferry", model="gpt-image-1")


def test_a_retried_task_finds_what_its_store_would_not_take(credentials, sandbox: Sandbox, tmp_path: Path):
    """A task that paid and could not store is retried: nothing is sent, though it is asked to refresh."""
    store = ImageStore(url=str(tmp_path / "store"), patience=0, rescue_folder=str(tmp_path / "rescue"))
    store.check_once()
    (obstacle := tmp_path / "store" / "images").touch()

    def make_room(*_: object) -> bool:
        obstacle.unlink()
        return True

    @flow
    def refreshing() -> BatchReport:
        options = {"refresh_cache": True, "retries": 1, "retry_condition_fn": make_room}
        generate_images.with_options(**options)(REQUEST, credentials, store)
        return generate_batch([REQUEST], credentials, store, refresh_cache=True)

    report = refreshing()
    assert [(row.status, row.maybe_paid, row.also_paid) for row in report.rows] == [("cached", (), ())]
    assert sandbox.calls == 1


def test_a_retried_task_does_not_send_what_may_be_paid(store, credentials, sandbox: Sandbox):
    """After a 504 neither the task's retries nor a batch in the same run send it again; the opt-in does."""

    @flow
    def retrying() -> BatchReport:
        with pytest.raises(UnknownOutcomeError, match="within one run it is not sent again"):
            generate_images.with_options(retries=1, refresh_cache=True)(TIMED_OUT, credentials, store)
        refused = generate_batch([TIMED_OUT], credentials, store, raise_on_failure=False).rows[0]
        assert (refused.status, refused.error_type) == ("failed", "UnknownOutcomeError")
        assert "perhaps paid for" in refused.maybe_paid[0]
        assert sandbox.calls == 1
        opted_in = credentials.model_copy(update={"retry_unknown_outcome": True})
        return generate_batch([TIMED_OUT], opted_in, store)

    row = retrying().rows[0]
    assert row.status == "generated"
    assert "HTTP 504" in row.maybe_paid[0]
    assert sandbox.calls == 2


def test_refused_retries_are_no_failures_in_a_row(store, credentials, sandbox: Sandbox):
    """What a retry refuses to send again neither counts as a call nor keeps it from what the first attempt skipped."""
    requests = [ImageRequest(prompt=f"[[sandbox:status=504]] {n}", model="gpt-image-1") for n in range(3)]
    requests += [ImageRequest(prompt=f"a pier {n}", model="gpt-image-1") for n in range(4)]
    reports: list[BatchReport] = []

    @flow(retries=1, persist_result=False)
    def nightly() -> None:
        options = {"breaker": 3, "max_in_flight": 1, "raise_on_failure": False}
        reports.append(generate_batch(requests, credentials, store, budget=Budget(images=4), **options))
        reports[-1].raise_for_failures()

    with pytest.raises(BatchError):
        nightly()
    first, second = (report.totals for report in reports)
    assert (first.generated, first.failed, first.skipped, first.api_calls) == (0, 3, 4, 3)
    assert (second.generated, second.failed, second.skipped, second.api_calls) == (4, 3, 0, 4)


@pytest.mark.parametrize(
    "shape", ["a batch in a task", "a task in a task", "a subflow", "a batch in a subflow"]
)
@pytest.mark.parametrize("refresh", [False, True])
def test_a_retry_of_what_calls_is_no_new_run(store, credentials, sandbox: Sandbox, shape: str, refresh: bool):
    """What a task outside flows, or a parent flow, calls again in its retry is neither sent nor refreshed anew."""
    attempts: list[int] = []

    def one() -> None:
        generate_images.with_options(refresh_cache=refresh)(REQUEST, credentials, store)
        generate_images(TIMED_OUT, credentials, store)

    def many() -> None:
        generate_batch([REQUEST, TIMED_OUT], credentials, store, refresh_cache=refresh, raise_on_failure=True)

    call = {
        "a batch in a task": many,
        "a task in a task": one,
        "a subflow": flow(persist_result=False)(one),
        "a batch in a subflow": flow(persist_result=False)(many),
    }[shape]
    kind = flow if "subflow" in shape else task

    @kind(retries=1, persist_result=False)
    def nightly() -> None:
        attempts.append(1)
        call()

    with pytest.raises((BatchError, UnknownOutcomeError)):
        nightly()
    assert len(attempts) == 2
    assert sandbox.calls == 2
    nightly()  # a new run, a new decision
    assert sandbox.calls == (4 if refresh else 3)


def test_a_later_run_says_what_may_be_paid_already(store, credentials, sandbox: Sandbox, caplog):
    """A batch's unknown outcome is in its row; the next run sends it, says so, and has the first payment in its row."""
    first = generate_batch([TIMED_OUT, REQUEST], credentials, store, raise_on_failure=False)
    assert [(row.status, len(row.maybe_paid)) for row in first.rows] == [("failed", 1), ("generated", 0)]
    second = generate_batch([TIMED_OUT, REQUEST], credentials, store)
    assert [(row.status, len(row.maybe_paid)) for row in second.rows] == [("generated", 1), ("cached", 0)]
    assert second.rows[0].maybe_paid[0].startswith(f"run {first.flow_run_id}: unknown: ")
    assert f"may already have been paid for by run {first.flow_run_id}" in caplog.text
    assert sandbox.calls == 3


@pytest.mark.parametrize("by_setting", [False, True], ids=["option", "setting"])
def test_a_failed_refresh_leaves_the_old_images(store, sandbox: Sandbox, by_setting: bool):
    """In tasks and batches: where refreshing fails, later runs go on with the old images, and pay nothing."""
    with Sandbox(api_key="right") as strict:
        right, wrong = (TTAPICredentials(api_key=key, base_url=strict.base_url) for key in ("right", "wrong"))
        old = generate_images(REQUEST, right, store)
        with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: by_setting}):
            options = {} if by_setting else {"refresh_cache": True}
            with pytest.raises(AuthenticationError):
                generate_images.with_options(**options)(REQUEST, wrong, store)
            report = generate_batch([REQUEST], wrong, store, raise_on_failure=False, **options)
            assert report.rows[0].error_type == "AuthenticationError"
        assert strict.calls == 3
        assert generate_images(REQUEST, right, store) == old
        assert generate_batch([REQUEST], right, store).rows[0].images == old.images
        assert strict.calls == 3


def interrupt_when(condition: Callable[[], bool]) -> threading.Thread:
    """Press Ctrl-C once `condition` holds."""

    def press() -> None:
        while not condition():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    return thread


def test_an_interrupted_task_finishes_what_is_under_way(store, caplog):
    """Ctrl-C while the API is at work: the answer is awaited, stored and recorded; the next run finds it."""
    with Sandbox(tiny=True, latency=0.5) as slow:
        credentials = TTAPICredentials(api_key="sandbox-key", base_url=slow.base_url)
        pressing = interrupt_when(lambda: slow.in_flight == 1)
        with pytest.raises(KeyboardInterrupt):
            generate_images(REQUEST, credentials, store)
        pressing.join()
        assert "Interrupted: what is under way" in caplog.text
        assert generate_images(REQUEST, credentials, store).images
        assert slow.calls == 1


def test_an_interrupted_task_that_waits_leaves_at_once(store, credentials, sandbox: Sandbox, caplog):
    """Ctrl-C while somebody else is paying: nothing is sent, and their record is not waited for."""
    caplog.set_level(logging.INFO, "prefect_ttapi")
    claim = acquire(Ledger(store, "sandbox", "another"), REQUEST.request_hash)
    assert isinstance(claim, Claim)
    with claim:
        pressing = interrupt_when(lambda: "is being generated by run another" in caplog.text)
        with pytest.raises(KeyboardInterrupt):
            generate_images(REQUEST, credentials, store)
        pressing.join()
    assert sandbox.calls == 0
