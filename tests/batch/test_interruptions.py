from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.runtime import task_run
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from prefect_ttapi import BatchReport, ImageStore, TTAPICredentials, agenerate_batch, generate_batch
from prefect_ttapi.sandbox import Sandbox
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def slow_sandbox() -> Iterator[Sandbox]:
    with Sandbox(tiny=True, latency=0.3) as slow:
        yield slow


@pytest.fixture
def slow(slow_sandbox: Sandbox) -> TTAPICredentials:
    return TTAPICredentials(api_key="sandbox-key", base_url=slow_sandbox.base_url)


def prompts(count: int, kind: str = "tree") -> list[dict[str, object]]:
    return [{"prompt": f"{kind} {number}", "model": "gpt-image-1"} for number in range(count)]


def statuses(store: ImageStore) -> list[str]:
    """Of the rows in the store's one manifest."""
    (manifest,) = Path(store.url).glob("batches/*/manifest.jsonl")
    return [json.loads(line)["status"] for line in manifest.read_text().splitlines()]


def test_a_source_that_breaks_leaves_a_row_for_all_that_it_gave(store, credentials, sandbox: Sandbox):
    """Requests that were taken for a task run that is not full yet are listed as not sent, duplicates too."""

    def source() -> Iterator[dict[str, object]]:
        yield from prompts(7)
        yield prompts(6)[5]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        generate_batch(source(), credentials, store, shard_size=5, max_in_flight=1)
    rows = statuses(store)
    assert len(rows) == 8
    assert rows.count("generated") == sandbox.calls
    assert rows[5:] == ["skipped"] * 3


def test_a_time_out_of_the_flow_ends_the_batch(store, slow, slow_sandbox: Sandbox):
    """In a thread a time-out comes with a task run's end, whose row is there all the same; nothing waits for ever."""

    @flow(timeout_seconds=2)
    def timed() -> None:
        generate_batch(prompts(60), slow, store, max_in_flight=2)

    async def in_a_thread() -> None:
        await asyncio.to_thread(timed)

    with pytest.raises(TimeoutError):
        asyncio.run(in_a_thread())
    rows = statuses(store)
    assert len(rows) == 60
    assert rows.count("generated") == slow_sandbox.paid < 60


def test_a_cancelled_async_batch_sends_nothing_more(store, slow, slow_sandbox: Sandbox):
    """A cancellation waits for what is under way; the rest of the rows is skipped, before the await ends."""

    @flow
    async def cancelled() -> None:
        batch = asyncio.ensure_future(agenerate_batch(prompts(60), slow, store, max_in_flight=2))
        while not slow_sandbox.paid:
            await asyncio.sleep(0.05)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch

    asyncio.run(cancelled())
    rows = statuses(store)
    assert len(rows) == 60
    assert rows.count("generated") == slow_sandbox.calls < 60


def test_a_source_that_hangs_holds_up_no_end(store, credentials, sandbox: Sandbox):
    """A batch whose source gives nothing more for now is cancelled at once, with a row for each that it gave."""
    hangs = threading.Event()

    def source() -> Iterator[dict[str, object]]:
        yield from prompts(3)
        assert hangs.wait(60)

    async def cancelled() -> None:
        batch = asyncio.ensure_future(agenerate_batch(source(), credentials, store, max_in_flight=2))
        while not list(Path(store.url).glob("batches/*/manifest.jsonl")):
            await asyncio.sleep(0.05)
            if sandbox.paid == 3:
                batch.cancel()
        assert not hangs.is_set()
        hangs.set()
        with pytest.raises(asyncio.CancelledError):
            await batch

    asyncio.run(cancelled())
    assert statuses(store) == ["generated"] * 3


class Refusing(ThreadPoolTaskRunner):
    """Takes one task run and no more."""

    def submit(self, task, parameters, wait_for=None, dependencies=None):
        if parameters["lane"].unquote().items[0].row:
            raise RuntimeError("no more")
        return super().submit(task, parameters, wait_for, dependencies)


def test_a_task_runner_that_refuses_leaves_a_row_for_each_request(store, credentials, sandbox: Sandbox):
    """What a task runner did not take is listed as not sent, duplicates too, and its error is the batch's."""

    @flow(task_runner=Refusing())
    def refused() -> None:
        generate_batch([*prompts(3), *prompts(3)], credentials, store, max_in_flight=4)

    with pytest.raises(RuntimeError, match="no more"):
        refused()
    first, *others = statuses(store)
    assert others == ["skipped"] * 5
    assert first == ("generated" if sandbox.calls else "skipped")


def test_an_interruption_while_the_manifest_is_written_loses_nothing(
    credentials, s3_server: S3Server, new_bucket
):
    """Ctrl-C at the very end comes when the manifest is there."""

    def interrupt(method: str, path: str, headers: dict[str, str]) -> None:
        if method == "PUT" and path.endswith("index.html"):
            os.kill(os.getpid(), signal.SIGINT)

    with meddling_proxy(s3_server.url, interrupt) as proxy:
        store = ImageStore(url=f"s3://{new_bucket()}/art", **s3_server.settings(endpoint_url=proxy.url))
        with pytest.raises(KeyboardInterrupt):
            generate_batch(prompts(2), credentials, store, name="{braces}")
        assert len([found for found in store.list("batches/") if found.key.endswith("manifest.jsonl")]) == 1


def test_a_second_interruption_leaves_a_row_for_each_request(store):
    """Who presses Ctrl-C twice does not wait for answers, and finds in the manifest what may have been paid for."""

    def twice(sandbox: Sandbox) -> None:
        while sandbox.in_flight < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    with Sandbox(tiny=True, latency=60) as sandbox:
        credentials = TTAPICredentials(api_key="sandbox-key", base_url=sandbox.base_url)
        threading.Thread(target=twice, args=(sandbox,)).start()
        with pytest.raises(KeyboardInterrupt):
            generate_batch(prompts(6), credentials, store, max_in_flight=2)
        assert sorted(statuses(store)) == ["failed"] * 2 + ["skipped"] * 4


def test_a_time_out_of_an_async_flow_ends_the_batch(store, slow, slow_sandbox: Sandbox):
    """The scope of Prefect's time-out cancels as asyncio does."""

    @flow(timeout_seconds=2)
    async def timed() -> None:
        await agenerate_batch(prompts(60), slow, store, max_in_flight=2)

    with pytest.raises(TimeoutError):
        asyncio.run(timed())
    rows = statuses(store)
    assert len(rows) == 60
    assert rows.count("generated") == slow_sandbox.calls < 60


def test_batches_in_tasks_do_not_wait_for_their_own_threads(store, credentials, sandbox: Sandbox):
    """With as many tasks as the runner has threads, each with a batch, all end, each filed by its task run."""
    task_runs: dict[str, object] = {}

    @task
    def part(kind: str) -> BatchReport:
        task_runs[kind] = task_run.id
        return generate_batch(prompts(3, kind), credentials, store, name=kind)

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
    def parts() -> list[BatchReport]:
        return part.map(["oak", "elm"]).result()

    reports = parts()
    assert [report.totals.generated for report in reports] == [3, 3]
    assert [report.rows[0].prompt for report in reports] == ["oak 0", "elm 0"]
    assert [report.manifest_uri for report in reports] == [
        store.uri(f"batches/{report.flow_run_id}/{task_runs[kind]}/manifest.jsonl")
        for kind, report in zip(["oak", "elm"], reports, strict=True)
    ]


def test_each_batch_of_a_run_keeps_its_manifest(store, credentials):
    """The second batch of a flow run has a folder of its own; a retry of the run writes over those of the first try."""
    attempts = []

    @flow(retries=1, persist_result=False)
    def twice() -> list[BatchReport]:
        attempts.append(1)
        reports = [generate_batch(prompts(count), credentials, store) for count in (3, 2)]
        if len(attempts) == 1:
            raise RuntimeError("a later step fails")
        return reports

    first, second = twice()
    assert first.manifest_uri == store.uri(f"batches/{first.flow_run_id}/manifest.jsonl")
    assert second.manifest_uri == store.uri(f"batches/{first.flow_run_id}/2/manifest.jsonl")
    assert [len(report.rows) for report in (first, second)] == [3, 2]
    assert len(list(Path(store.url).glob("batches/**/manifest.jsonl"))) == 2
    assert [row.status for row in BatchReport.model_validate(second.model_dump()).rows] == ["cached"] * 2


def test_the_manifest_is_there_without_its_page(credentials, s3_server: S3Server, new_bucket):
    """Where the gallery page can't be written, what became of the requests is written all the same."""

    def refuse_pages(method: str, path: str, headers: dict[str, str]) -> int | None:
        return 403 if method == "PUT" and path.endswith(".html") else None

    with meddling_proxy(s3_server.url, refuse_pages) as proxy:
        store = ImageStore(url=f"s3://{new_bucket()}/art", **s3_server.settings(endpoint_url=proxy.url))
        report = generate_batch(prompts(2), credentials, store)
        assert [row.status for row in report.rows] == ["generated", "generated"]
        assert report.gallery_uri is None


class Deadly:
    """Ends the process that a task run is sent to."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (1,)


@pytest.mark.integration
def test_other_processes_stop_and_die_as_threads_do(store, credentials, sandbox: Sandbox):
    """A 401 that a task run in another process gets stops the batch; one whose process dies twice is a failed row."""

    @flow(task_runner=ProcessPoolTaskRunner(max_workers=1))
    def elsewhere() -> list[BatchReport]:
        refused = [*prompts(1), {"prompt": "[[sandbox:status=401]]"}, *prompts(4, "later")]
        options = {"max_in_flight": 1, "raise_on_failure": False}
        return [
            generate_batch(refused, credentials, store, **options),
            generate_batch(prompts(1, "dead"), credentials, store, values=[{"x": Deadly()}], **options),
        ]

    refused, dead = elsewhere()
    assert [row.status for row in refused.rows] == ["generated", "failed", *["skipped"] * 4]
    assert sandbox.calls == 2
    assert [(row.status, row.error_type, row.maybe_paid) for row in dead.rows] == [
        ("failed", "LaneLostError", ())
    ]
    assert (dead.rows[0].error or "").startswith("not sent, as its task run broke down")


@pytest.mark.integration
def test_a_cancellation_is_heard_of_in_other_processes(store, slow, slow_sandbox: Sandbox):
    """What is under way there is finished when the batch is cancelled; nothing else is sent, each row says so."""

    @flow(task_runner=ProcessPoolTaskRunner(max_workers=2))
    def elsewhere() -> None:
        generate_batch(prompts(60, "[[sandbox:latency=1.5]] tree"), slow, store, max_in_flight=2)

    def call_off() -> None:
        while not slow_sandbox.paid:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    # Not within the flow: it is pickled with what it closes over.
    called_off = threading.Thread(target=call_off)
    called_off.start()
    with pytest.raises(KeyboardInterrupt):
        elsewhere()
    called_off.join()
    rows = statuses(store)
    assert len(rows) == 60
    # each of two task runs carries eight
    assert rows.count("generated") == slow_sandbox.calls < 12
    assert rows.count("skipped") == 60 - slow_sandbox.calls
