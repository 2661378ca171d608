"""Lanes as task runs: what one does, wherever it runs, and how the flow's task runner is asked for it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, Final, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings
from prefect.states import Failed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import TaskRunNameCallbackWithParameters

from prefect_ttapi.batch.items import Done, Work
from prefect_ttapi.batch.lanes import PATIENCE, Breaker, Lane, LaneRun, Shared
from prefect_ttapi.batch.options import Plan
from prefect_ttapi.credentials import TTAPICredentials, shared_client
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.engine import Engine, ledger_for
from prefect_ttapi.generation.limits import Limits, RateLimit
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.layout import stop_key
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Seconds between looks of a lane elsewhere whether the batch has stopped.
LOOK: Final = 2.0

#: What the lanes of the open batches share, by process, as a fork takes no threads along, and batch.
_OPEN: Final[dict[tuple[int, str], Shared]] = {}


class TaskRuns(ExitStack):
    """Starts lanes' task runs: on the flow's task runner, or inside a task in threads of its own.

    Tasks that wait for others in one pool may fill it. No pool of processes survives the death of one of them: another
    one like it takes its place.

    Args:
        shared: what the lanes in this process share.
        most: lanes that are open at once, at most.
    """

    def __init__(
        self, credentials: TTAPICredentials, store: ImageStore, plan: Plan, shared: Shared, most: int
    ) -> None:
        super().__init__()
        self._common = {"credentials": credentials, "store": store, "plan": plan}
        self._runner = runner = flow_task_runner()
        self._broken: set[int] = set()
        here = os.getpid(), plan.batch_id
        self.callback(shared.left.set)
        self.callback(_OPEN.pop, here)
        _OPEN[here] = shared
        if runner is None:
            self._threads = self.enter_context(ThreadPoolExecutor(most, thread_name_prefix="ttapi-lanes"))
        elif type(runner).__module__.startswith("prefect_ray."):
            self.enter_context(_asked_of_ray())

    def submit(self, lane: Lane) -> PrefectFuture[Any] | Future[Any]:
        """Start a lane's task run."""
        parameters: dict[str, Any] = {"lane": lane, **self._common}
        runner = self._runner
        if runner is None:
            lane_run = partial(generate_lane, **parameters, return_state=True)
            return self._threads.submit(copy_context().run, lane_run)
        if not isinstance(runner, ProcessPoolTaskRunner):
            future: PrefectFuture[Any] = generate_lane.submit(**parameters)
            return future
        if id(runner) in self._broken:
            self._runner = runner = self.enter_context(runner.duplicate())
        future = runner.submit(generate_lane, parameters)
        future.add_done_callback(partial(self._look, runner))
        return future

    def _look(self, runner: ProcessPoolTaskRunner, future: PrefectFuture[Any]) -> None:
        try:
            future.result(raise_on_failure=False)
        except BrokenExecutor:
            self._broken.add(id(runner))
        except BaseException as error:  # the lane's, who is told as well
            logger.debug("A task run broke down: %s", error)


def _asked_of_ray() -> AbstractContextManager[None]:
    """Ask Ray for what a lane needs, unless the user asks for something else.

    It waits more than it works, which takes no whole CPU. Lanes are spread over the nodes, so that one that dies takes
    few along. Ray does not repeat a lane by itself, as nobody would hear of what it lost.
    """
    context = import_module("prefect_ray.context")
    ours = {"num_cpus": 0.1, "scheduling_strategy": "SPREAD", "max_retries": 0}
    theirs = context.RemoteOptionsContext.get().current_remote_options
    return cast(AbstractContextManager[None], context.remote_options(**ours | theirs))


def slots() -> int | None:
    """Return how many task runs the flow's task runner has room for at least, where that is known."""
    if not isinstance(flow_task_runner(), ProcessPoolTaskRunner):
        return None
    setting = get_current_settings().tasks.runner.process_pool_max_workers
    return setting or multiprocessing.cpu_count()


def flow_task_runner() -> TaskRunner[Any] | None:
    """Return the task runner of the flow that this is called in; None inside a task."""
    flow_run = FlowRunContext.get()
    return flow_run.task_runner if flow_run and TaskRunContext.get() is None else None


def is_local() -> bool:
    """Return whether lanes run in threads of this process."""
    runner = flow_task_runner()
    return runner is None or isinstance(runner, ThreadPoolTaskRunner)


def tell_elsewhere(store: ImageStore, plan: Plan, stop: Stop) -> None:
    """Write down for lanes in other processes why nothing more is sent."""
    told = {"batch_id": plan.batch_id, "reason": stop.reason, "error_type": stop.error_type}
    try:
        store.write(stop_key(plan.folder), json.dumps(told).encode(), "application/json")
    except StoreError as error:
        logger.warning("Task runs in other processes finish what they carry: %s", error)


def _is_told(store: ImageStore, plan: Plan, shared: Shared) -> bool:
    try:
        told = json.loads(store.read(stop_key(plan.folder)) or b"{}")
    except (StoreError, ValueError):
        return False
    if told.get("batch_id") != plan.batch_id:  # nothing, or an earlier attempt's
        return False
    shared.stop.set(told["reason"], told["error_type"])
    return True


@contextmanager
def _hearing(store: ImageStore, plan: Plan, shared: Shared) -> Iterator[None]:
    """Look, until a lane elsewhere has ended, whether its batch has told it to stop."""
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(LOOK) and not _is_told(store, plan, shared):
            pass

    _is_told(store, plan, shared)  # a lane may begin after the stop
    threading.Thread(target=copy_context().run, args=(listen,), name="ttapi-stop", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _shared_for(lane: Lane, plan: Plan) -> Shared | None:
    """Return what the batch's lanes share in this process, or the share of a lane that is elsewhere.

    None: the batch was left before the lane got a worker.
    """
    if not lane.elsewhere:
        return _OPEN.get((os.getpid(), plan.batch_id))
    limits = Limits(
        in_flight=lane.width,
        # whoever had this share before may just have sent
        rate=RateLimit(lane.rate, at_once=lane.rate_unused) if lane.rate else None,
        spending=lane.share,
    )
    return Shared(limits, Breaker(plan.options.breaker, plan.options.max_refused))


class Results(list[Done | None]):
    """A lane's rows; Prefect writes the repr of a failed state into the log, where rows and prompts have no place."""

    def __repr__(self) -> str:
        return f"{len(self)} row(s)"


def _lane_name(parameters: dict[str, Any]) -> str:
    """Return `generate-gpt-image-2-3f9a12`, or `generate-34-requests-from-68`."""
    items = parameters["lane"].items
    first = items[0]
    if len(items) == 1:
        return f"generate-{first.request.model}-{first.request.request_hash[:6]}"
    return f"generate-{len(items)}-requests-from-{first.row}"


def _step_aside() -> None:
    """Leave the threads of a Dask worker, if this is in one, to other tasks: a lane waits more than it works."""
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        with suppress(ValueError):  # not in a worker
            distributed.secede()


# retries belong to the client: without `retries` Prefect's setting for all tasks would count
@task(
    name="generate-lane",
    # its protocol has more than what Prefect calls
    task_run_name=cast(TaskRunNameCallbackWithParameters, _lane_name),
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=0,
)
def generate_lane(
    lane: Lane, credentials: TTAPICredentials, store: ImageStore, plan: Plan
) -> list[Done | None] | State[Results]:
    """Generate and deliver each item of a lane; return a row for each, in order.

    None stands for an item that nobody waits for any longer, or one that another run is still paying for. A lane of
    one request that fails is a failed task run, whose state has the row all the same.
    """
    task_ctx = TaskRunContext.get()
    shared = _shared_for(lane, plan)
    if shared is None:
        return [None] * len(lane.items)  # nothing more is sent, and their rows are written
    run = replace(plan.run, task_run_id=str(task_ctx.task_run.id) if task_ctx else None)
    ledger = ledger_for(credentials, store, run.run_id, get_run_logger())
    engine = Engine(shared_client(credentials), store, ledger, run, shared.limits, plan.not_before)
    delivery = plan.options.delivery(run.date, run.flow_run_id, store)
    work = Work(engine, plan.options, delivery)
    patience, cut = store.claim_ttl + PATIENCE, plan.options.shard_size is None
    lane_run = LaneRun(lane, work, shared, patience=patience, cut=cut)
    if lane.elsewhere:
        _step_aside()
        with _hearing(store, plan, shared):
            results = lane_run.results()
    else:
        results = lane_run.results()
    only = results[0] if len(results) == 1 else None
    if only is not None and only.row.status == "failed":
        row = plan.options.shown.row(only.row)
        return Failed(message=f"{row.error_type}: {row.error}", data=Results(results))
    return results
