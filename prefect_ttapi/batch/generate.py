"""`generate_batch` and its async twin."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext, TaskRunContext

from prefect_ttapi.batch.budget import Budget, Spending
from prefect_ttapi.batch.coordinator import Coordinator
from prefect_ttapi.batch.intake import Intake, KeyCheck, Values, take_in
from prefect_ttapi.batch.recording import Recorder, folder_of_batch
from prefect_ttapi.batch.report import BatchReport
from prefect_ttapi.batch.shards import Plan, stop_of
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import IllegalBatchError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.runs import not_before, run_attempt, run_date, run_id
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.ledger import Ledger
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.threads import in_thread

Requests = Iterable[ImageRequest | Mapping[str, Any]]

#: A batch makes at most this many task runs by itself: a Prefect server takes about 20 a second.
TASK_RUNS = 300


def generate_batch(
    requests: Requests,
    credentials: TTAPICredentials,
    store: ImageStore,
    deliver_to: ImageStore | None = None,
    key: str = DEFAULT_KEY,
    values: Values = None,
    max_in_flight: int = 8,
    shard_size: int | None = None,
    budget: Budget | None = None,
    raise_on_failure: bool = True,
    name: str = "batch",
    *,
    refresh_cache: bool | None = None,
    cache_expiration: timedelta | None = None,
) -> BatchReport:
    """Generate, and deliver, every request; each ends as a row of the report, and one bad prompt costs one row.

    To be called inside any flow, whose task runs and artifacts its own then are; outside, it opens a flow run. The
    manifest lies beside the images, at `batches/<flow run>/manifest.jsonl` in `store`, and a gallery page with it;
    those of the run's second batch at `batches/<flow run>/2/`, and so on.

    Args:
        requests: requests or mappings of their fields. A sequence is checked whole before anything is paid for; in
            any other iterable, read in a thread of the batch, an illegal item is a failed row.
        credentials: the API key, and how patient to be.
        store: where the images and the ledger are.
        deliver_to: where copies go under keys of the template `key`; None delivers nothing.
        key: template over `name slug hash index ext model size date batch` and the names in `values`.
        values: a mapping per request, in order, or a function of the request.
        max_in_flight: how many requests are under way at once.
        shard_size: requests per task run; by default 1, more where that would make over 300 task runs.
        budget: limits of this batch; what does not fit ends as a skipped row.
        raise_on_failure: raise `BatchError` at the end, after all else is delivered and recorded.
        name: names the batch in artifacts, pages and key templates.
        refresh_cache: pay anew for what was paid for before this run; by default as Prefect's setting says.
        cache_expiration: pay anew for what was paid for longer ago than this.

    Raises:
        IllegalBatchError: illegal requests, keys or arguments; nothing was sent.
        StoreError: a store can't be reached or written; nothing was sent.
        BatchError: rows failed, and `raise_on_failure`; its `report` has them.
    """
    return _generate(
        uuid.uuid4().hex,
        requests,
        credentials,
        store,
        deliver_to,
        key,
        values,
        max_in_flight,
        shard_size,
        budget,
        raise_on_failure,
        name,
        refresh_cache,
        cache_expiration,
    )


async def agenerate_batch(
    requests: Requests,
    credentials: TTAPICredentials,
    store: ImageStore,
    deliver_to: ImageStore | None = None,
    key: str = DEFAULT_KEY,
    values: Values = None,
    max_in_flight: int = 8,
    shard_size: int | None = None,
    budget: Budget | None = None,
    raise_on_failure: bool = True,
    name: str = "batch",
    *,
    refresh_cache: bool | None = None,
    cache_expiration: timedelta | None = None,
) -> BatchReport:
    """`generate_batch` for async flows: same arguments, report and errors, in a worker thread.

    A cancellation or a time-out stops the batch: what is under way is finished, the rest is skipped.
    """
    batch_id = uuid.uuid4().hex
    work = partial(
        _generate,
        batch_id,
        requests,
        credentials,
        store,
        deliver_to,
        key,
        values,
        max_in_flight,
        shard_size,
        budget,
        raise_on_failure,
        name,
        refresh_cache,
        cache_expiration,
    )
    with stop_of(batch_id) as stop:
        return await in_thread(work, on_cancel=stop.cancel)


def _generate(
    batch_id: str,
    requests: Requests,
    credentials: TTAPICredentials,
    store: ImageStore,
    deliver_to: ImageStore | None,
    key: str,
    values: Values,
    max_in_flight: int,
    shard_size: int | None,
    budget: Budget | None,
    raise_on_failure: bool,
    name: str,
    refresh_cache: bool | None,
    cache_expiration: timedelta | None,
) -> BatchReport:
    intake = check_batch(
        requests,
        credentials,
        store,
        deliver_to=deliver_to,
        key=key,
        values=values,
        max_in_flight=max_in_flight,
        shard_size=shard_size,
        budget=budget,
        name=name,
    )

    def work() -> BatchReport:
        plan = Plan(
            batch_id=batch_id,
            name=name,
            date=run_date(TaskRunContext.get()),
            key=key,
            deliver_to=deliver_to,
            not_before=not_before(refresh_cache, cache_expiration, TaskRunContext.get()),
            in_flight=1,
        )
        return _run(intake, credentials, store, plan, Spending(budget), max_in_flight, shard_size)

    report = work() if FlowRunContext.get() else _in_own_flow(work, name)
    if raise_on_failure:
        report.raise_for_failures()
    return report


def check_batch(
    requests: Requests,
    credentials: TTAPICredentials,
    store: ImageStore,
    *,
    deliver_to: ImageStore | None = None,
    key: str = DEFAULT_KEY,
    values: Values = None,
    max_in_flight: int = 8,
    shard_size: int | None = None,
    budget: Budget | None = None,
    name: str = "batch",
) -> Intake:
    """All that can be found wrong with a batch before it is sent; `generate_batch` begins with it.

    Raises:
        IllegalBatchError: illegal requests, keys or arguments.
        StoreError: a store can't be reached or written.
    """
    if max_in_flight < 1 or (shard_size is not None and shard_size < 1):
        raise IllegalBatchError(["max_in_flight and shard_size must be at least 1"])
    for argument, kind in ((credentials, TTAPICredentials), (store, ImageStore)):
        if not isinstance(argument, kind):
            raise IllegalBatchError([f"a {kind.__name__} is needed, not {type(argument).__name__}"])
    keys = KeyCheck(key, name, datetime.now(UTC)) if deliver_to is not None else None
    intake = take_in(requests, values, keys, budget)
    store.check()
    if deliver_to is not None:
        deliver_to.check_writable()
    return intake


def _run(
    intake: Intake,
    credentials: TTAPICredentials,
    store: ImageStore,
    plan: Plan,
    spending: Spending,
    max_in_flight: int,
    shard_size: int | None,
) -> BatchReport:
    """The batch, inside a flow run."""
    run = run_id(None)
    slots, size, in_flight = _shape(intake.total, max_in_flight, shard_size)
    ledger = Ledger(
        store, credentials.api_origin, run_id=run, retry_unknown_outcome=credentials.retry_unknown_outcome
    )
    folder = folder_of_batch(run, run_attempt())
    with Recorder(store, plan.name, run, folder, intake.total) as recorder:
        coordinator = Coordinator(
            credentials,
            store,
            ledger,
            replace(plan, in_flight=in_flight),
            spending,
            slots=slots,
            shard_size=size,
            on_done=recorder.add,
        )
        try:
            coordinator.run(recorder.marked(intake.items), bounded=intake.total is not None)
        finally:
            report = recorder.finish()
    return report


def _shape(total: int | None, max_in_flight: int, shard_size: int | None) -> tuple[int, int, int]:
    """How many shards at once, requests per shard, and how many of these at once.

    >>> _shape(200, 8, None), _shape(10_000, 32, None)
    ((8, 1, 1), (4, 34, 8))
    """
    size = shard_size or max(1, math.ceil((total or 0) / TASK_RUNS))
    in_flight = min(size, math.ceil(max_in_flight / 4))  # several shards, so that the end of one is no pause
    return max(1, max_in_flight // in_flight), size, in_flight


def _in_own_flow(work: Callable[[], BatchReport], name: str) -> BatchReport:
    """Run `work` as a flow without parameters: the server would store them, prompts and all."""
    return flow(name="generate-batch", flow_run_name=name, persist_result=False, validate_parameters=False)(
        work
    )()
