"""What the prevailing Prefect runs say: who pays, what counts as one run, when it began."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from prefect.client.schemas.objects import TaskRunResult
from prefect.context import FlowRunContext, TaskRunContext
from prefect.settings import get_current_settings
from prefect.tasks import TaskRunNameCallbackWithParameters

from prefect_ttapi.generation.engine import Payer


def run_id(task_ctx: TaskRunContext | None) -> str:
    """What counts as one run: the flow run, outside flows the task run, outside Prefect each call.

    A retry of what calls a subflow, or a task outside flows, makes a new run of that: it counts as the call, which is
    the same in each attempt.
    """
    flow = FlowRunContext.get()
    if flow and flow.flow_run:
        return str(flow.flow_run.parent_task_run_id or flow.flow_run.id)
    if task_ctx is None:
        return uuid.uuid4().hex
    run = task_ctx.task_run
    callers = [
        caller.id for caller in run.task_inputs.get("__parents__", ()) if isinstance(caller, TaskRunResult)
    ]
    return str(next((run_id for run_id in (run.flow_run_id, *callers) if run_id), run.id))


def flow_run_id() -> str | None:
    """The flow run's id, as people know it; None outside flows."""
    flow = FlowRunContext.get()
    return str(flow.flow_run.id) if flow and flow.flow_run else None


def payer_of(task_ctx: TaskRunContext | None) -> Payer:
    """The runs to name in a record."""
    apart = task_ctx and task_ctx.task_run.flow_run_id
    return Payer(
        flow_run_id=flow_run_id() or (str(apart) if apart else None),
        task_run_id=str(task_ctx.task_run.id) if task_ctx else None,
    )


def filed_under() -> tuple[str, tuple[int, ...]]:
    """Where what this flow run leaves is filed, and which attempt at it this is.

    What a task of the flow leaves is filed below that, by its task run: others may be at work in other processes.
    """
    flow, task_ctx = FlowRunContext.get(), TaskRunContext.get()
    run = flow.flow_run if flow else None
    if run is None:
        return uuid.uuid4().hex, (1,)
    if task_ctx is None or task_ctx.task_run.flow_run_id != run.id:
        return str(run.id), (run.run_count,)
    return f"{run.id}/{task_ctx.task_run.id}", (run.run_count, task_ctx.task_run.run_count)


def run_date(task_ctx: TaskRunContext | None) -> datetime:
    """The run's expected start, UTC: a retry past midnight has the same."""
    flow = FlowRunContext.get()
    run = flow.flow_run if flow and flow.flow_run else task_ctx and task_ctx.task_run
    return (run and run.expected_start_time) or datetime.now(UTC)


def named(callback: Callable[[dict[str, Any]], str]) -> TaskRunNameCallbackWithParameters:
    """A function of the parameters as a task run's name; Prefect's protocol asks mypy for more than it calls."""
    return cast(TaskRunNameCallbackWithParameters, callback)


def run_name() -> str:
    """What `batch` is in a key template where there is no batch: the flow's name."""
    flow = FlowRunContext.get()
    return flow.flow.name if flow and flow.flow else "images"


def run_start(task_ctx: TaskRunContext | None) -> datetime:
    """When this run began, UTC: the flow run where there is one, and its first attempt where it was retried."""
    flow = FlowRunContext.get()
    flow_start = (flow.flow_run.start_time or flow.start_time) if flow and flow.flow_run else None
    return (
        flow_start
        or (task_ctx and (task_ctx.task_run.start_time or task_ctx.start_time))
        or datetime.now(UTC)
    )


def not_before(
    refresh_cache: bool | None, cache_expiration: timedelta | None, task_ctx: TaskRunContext | None
) -> datetime | None:
    """Records older than this don't count, by Prefect's two options; None: all count.

    Refreshing means older than this run's start: a retry within the run does not pay again. Where `refresh_cache` is
    None, Prefect's setting decides.
    """
    refresh = get_current_settings().tasks.refresh_cache if refresh_cache is None else refresh_cache
    if refresh:
        return run_start(task_ctx)
    return datetime.now(UTC) - cache_expiration if cache_expiration else None


def task_not_before(task_ctx: TaskRunContext | None) -> datetime | None:
    """`not_before` by the options of the task that is running; outside one, all records count."""
    if task_ctx is None:
        return None
    return not_before(task_ctx.task.refresh_cache, task_ctx.task.cache_expiration, task_ctx)
