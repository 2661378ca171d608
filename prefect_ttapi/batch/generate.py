"""`generate_batch` and its async twin."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from prefect import flow
from prefect.context import FlowRunContext, TaskRunContext
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_ttapi.batch.breaker import Breaker
from prefect_ttapi.batch.coordinator import Coordinator
from prefect_ttapi.batch.earlier import remember
from prefect_ttapi.batch.intake import Intake, KeyCheck, Values, take_in
from prefect_ttapi.batch.known import Known
from prefect_ttapi.batch.recording import Recorder, folder_of_batch
from prefect_ttapi.batch.report import BatchReport
from prefect_ttapi.batch.runners import flow_task_runner
from prefect_ttapi.batch.session import Session, Stop, shared
from prefect_ttapi.batch.shape import Shape
from prefect_ttapi.batch.shards import Plan
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import IllegalBatchError
from prefect_ttapi.generation.budget import Budget, Spending
from prefect_ttapi.generation.context import filed_under, flow_run_id, not_before, run_date, run_id
from prefect_ttapi.generation.interruption import GRACE, in_thread, uninterrupted
from prefect_ttapi.generation.ledgers import ledger_for
from prefect_ttapi.images.renditions import Rendition, versions_of
from prefect_ttapi.lineage.assets import materialise_batch
from prefect_ttapi.lineage.events import batch_completed
from prefect_ttapi.lineage.links import StoreLinks
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.wire.limiter import RateLimit

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

Requests = Iterable[ImageRequest | Mapping[str, Any]]


#: How a cancellation reaches the batch that runs in a worker thread of an async flow.
_STOP: ContextVar[Stop | None] = ContextVar("ttapi_stop", default=None)


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
    breaker: int | None = 10,
    rate_limit: float | None = None,
    grace: float = GRACE,
    thumbnails: bool = True,
    renditions: Sequence[Rendition | Mapping[str, Any]] = (),
    keep_original: bool = True,
    overwrite: bool = False,
    record_prompts: bool = True,
) -> BatchReport:
    """Generate, and deliver, every request; each ends as a row of the report, and one bad prompt costs one row.

    To be called inside any flow, whose task runs and artifacts its own then are; outside, it opens a flow run. The
    manifest lies beside the images, at `batches/<flow run>/manifest.jsonl` in `store`, and a gallery page with it;
    those of the run's second batch at `batches/<flow run>/2/`, and so on; of a batch in one of the flow's tasks at
    `batches/<flow run>/<task run>/`.

    Args:
        requests: requests or mappings of their fields. A sequence is checked whole before anything is paid for; in
            any other iterable, read in a thread of the batch as room comes up, an illegal item is a failed row. It
            should come to an end: where nothing more may be sent, the rest of it is listed as skipped.
        credentials: the API key, and how patient to be.
        store: where the images and the ledger are.
        deliver_to: where copies go under keys of the template `key`; None delivers nothing.
        key: template over `name slug hash index ext model size date batch` and the names in `values`.
        values: a mapping per request, in order, or a function of the request.
        max_in_flight: how many requests are under way at once, as far as the flow's task runner has room for their
            task runs: `ThreadPoolTaskRunner(max_workers=2)` needs a `shard_size` that keeps two of them busy.
        shard_size: requests per task run; by default 1, more where that would make over 300 task runs.
        budget: limits of this batch; what does not fit ends as a skipped row.
        raise_on_failure: raise `BatchError` at the end, after all else is delivered and recorded.
        name: names the batch in artifacts, pages and key templates.
        refresh_cache: pay anew for what was paid for before this run; by default as Prefect's setting says.
        cache_expiration: pay anew for what was paid for longer ago than this.
        breaker: so many failures of one kind in a row stop the batch; refused prompts don't count. None: never.
        rate_limit: requests per minute, at most.
        grace: seconds after a cancellation, SIGTERM or Ctrl-C for what is under way to be finished and recorded,
            before the manifest is written without it.
        thumbnails: show small pictures in the gallery and the artifact; about 10 ms of CPU each.
        renditions: smaller or lighter versions to deliver beside each image.
        keep_original: deliver the image itself, too.
        overwrite: replace what is at the delivered keys; else another object there is a failed row.
        record_prompts: False keeps prompts out of what is shown (artifacts, pages, logs, events, metadata of delivered
            objects, keys); the manifest and the ledger, which are the store's, have them.

    Raises:
        IllegalBatchError: illegal requests, keys or arguments; nothing was sent.
        StoreError: a store can't be reached or written; nothing was sent.
        BatchError: rows failed, and `raise_on_failure`; its `report` has them.
    """
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
        breaker=breaker,
        rate_limit=rate_limit,
        renditions=renditions,
        keep_original=keep_original,
        record_prompts=record_prompts,
    )

    task_ctx = TaskRunContext.get()
    # asked outside the flow run of our own that each retry of the task makes anew
    tasks_run = run_id(task_ctx) if task_ctx else None

    def work() -> BatchReport:
        local = isinstance(flow_task_runner() or ThreadPoolTaskRunner(), ThreadPoolTaskRunner)
        shape = Shape.of(intake.total, max_in_flight, shard_size, local=local)
        plan = Plan(
            batch_id=uuid.uuid4().hex,
            run_id=tasks_run or run_id(None),
            name=name,
            date=run_date(TaskRunContext.get()),
            key=key,
            deliver_to=deliver_to,
            not_before=not_before(refresh_cache, cache_expiration, TaskRunContext.get()),
            in_flight=shape.in_flight,
            rate_limit=rate_limit and rate_limit / shape.slots,
            breaker=breaker,
            thumbnails=thumbnails,
            versions=versions_of(renditions, keep_original=keep_original),
            overwrite=overwrite,
            record_prompts=record_prompts,
        )
        session = partial(
            Session,
            max_in_flight,
            Spending(budget),
            breaker=Breaker(breaker),
            rate=RateLimit(rate_limit) if rate_limit else None,
            stop=_STOP.get(),
        )
        return _run(intake, credentials, store, plan, shape, session, grace)

    report = work() if FlowRunContext.get() else _in_own_flow(work, name)
    if raise_on_failure:
        report.raise_for_failures()
    return report


def _async_twin(function: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    @wraps(function)
    async def twin(*args: P.args, **kwargs: P.kwargs) -> R:
        stop = Stop()
        token = _STOP.set(stop)
        try:
            return await in_thread(partial(function, *args, **kwargs), on_cancel=stop.cancel)
        finally:
            _STOP.reset(token)

    return twin


agenerate_batch = _async_twin(generate_batch)
agenerate_batch.__name__ = agenerate_batch.__qualname__ = "agenerate_batch"
agenerate_batch.__doc__ = """`generate_batch` for async flows: same arguments, report and errors, in a worker thread.

A cancellation or a time-out stops the batch: what is under way is finished, the rest is skipped.
"""


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
    breaker: int | None = None,
    rate_limit: float | None = None,
    renditions: Sequence[Rendition | Mapping[str, Any]] = (),
    keep_original: bool = True,
    record_prompts: bool = True,
) -> Intake:
    """All that can be found wrong with a batch before it is sent; `generate_batch` begins with it.

    Raises:
        IllegalBatchError: illegal requests, keys or arguments.
        StoreError: a store can't be reached or written.
    """
    at_least_one = {"max_in_flight": max_in_flight, "shard_size": shard_size, "breaker": breaker}
    problems = [
        f"{option} must be a whole number of at least 1, not {value!r}"
        for option, value in at_least_one.items()
        if (type(value) is not int or value < 1) and (value is not None or option == "max_in_flight")
    ]
    if rate_limit is not None and not 0 < rate_limit < math.inf:
        problems.append(f"rate_limit must be a number of requests per minute above 0, not {rate_limit}")
    if problems:
        raise IllegalBatchError(problems)
    kinds: list[tuple[object, type]] = [(credentials, TTAPICredentials), (store, ImageStore)]
    kinds += [
        (given, kind) for given, kind in ((deliver_to, ImageStore), (budget, Budget)) if given is not None
    ]
    for argument, kind in kinds:
        if not isinstance(argument, kind):
            raise IllegalBatchError([f"{kind.__name__} is needed, not {type(argument).__name__}"])
    try:
        versions = versions_of(renditions, keep_original=keep_original)
    except ValueError as error:
        raise IllegalBatchError([f"renditions: {error}"]) from None
    now = datetime.now(UTC)
    keys = None
    if deliver_to is not None:
        keys = KeyCheck(key, name, now, versions, record_prompts, address=deliver_to.objects.uri)
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
    shape: Shape,
    new_session: Callable[..., Session],
    grace: float,
) -> BatchReport:
    """The batch, inside a flow run."""
    place, attempt = filed_under()
    run = flow_run_id() or place
    ledger = ledger_for(credentials, store, plan.run_id)
    folder = folder_of_batch(place, attempt)
    coordinator = Coordinator(credentials, store, ledger, plan, shape)
    session = new_session(on_done=coordinator.returned, on_waiting=coordinator.waits)
    known = Known(store, ledger, plan, intake.hashes)
    recorder = Recorder(
        store,
        plan.name,
        run,
        folder,
        intake.total,
        in_flight=partial(coordinator.in_flight, session),
        prices=session.spending.budget.prices,
        links=StoreLinks(plan.deliver_to, store),
        record_prompts=plan.record_prompts,
    )
    with shared(session, plan.batch_id), recorder:
        items = known.sort_out(intake.items, lambda: session.stop.cancelled)
        try:
            coordinator.run(items, session, recorder.add, bounded=intake.total is not None, grace=grace)
        finally:
            # not even a first Ctrl-C is to cost the manifest
            again = session.stop.cancelled
            report = uninterrupted(
                lambda: recorder.finish(session.spending.overshoot()),
                lambda _: logger.warning("Interrupted: %.0f s to write the manifest", 0 if again else grace),
                grace=0 if again else grace,
            )
            remember(store, plan.name, ledger.api_origin, folder)
    batch_completed(report.facts)
    return materialise_batch(report, report.facts)


def _in_own_flow(work: Callable[[], BatchReport], name: str) -> BatchReport:
    """Run `work` as a flow without parameters: the server would store them, prompts and all."""
    named = name.replace("{", "{{").replace("}", "}}")  # Prefect takes it for a template
    own = flow(name="generate-batch", flow_run_name=named, persist_result=False, validate_parameters=False)
    return own(work)()
