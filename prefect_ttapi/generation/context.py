"""What a run is: who pays, where it files what it leaves, what people know it by, which attempt it is."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self, cast

from prefect.client.schemas.objects import TaskRunResult
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings
from prefect.tasks import TaskRunNameCallbackWithParameters

from prefect_ttapi.ledger.documents import Log

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """What the prevailing Prefect runs say, read once, where a task or a batch begins.

    Attributes:
        run_id: who pays. Within one run a request is sent once: the flow run, outside flows the task run, outside
            Prefect each call. A retry of the caller of a subflow, or of a task outside flows, makes a new run of
            that, so it counts as the call, which is the same in each attempt.
        flow_run_id, task_run_id: the runs as people know them; None where there is none.
        flow_name: the flow's name; `images` outside flows.
        place: where a batch of the run is filed. What a task of the flow leaves is filed below the flow run, by its
            task run: others may be at work in other processes.
        attempt: which attempt at the flow run, and at the task run, this is.
        date: the expected start, UTC: a retry past midnight has the same.
        started: when the first attempt began, UTC.
    """

    run_id: str
    flow_run_id: str | None
    task_run_id: str | None
    flow_name: str
    place: str
    attempt: tuple[int, ...]
    date: datetime
    started: datetime

    @classmethod
    def current(cls, task_ctx: TaskRunContext | None = None) -> Self:
        """Return the context of the run in which this is called.

        Args:
            task_ctx: the task run, where Prefect has not made it the prevailing one yet.
        """
        task_ctx = task_ctx or TaskRunContext.get()
        flow_ctx = FlowRunContext.get()
        flow = flow_ctx.flow_run if flow_ctx else None
        task = task_ctx.task_run if task_ctx else None
        own_task = task is not None and flow is not None and task.flow_run_id == flow.id
        flow_run_id = flow.id if flow else task.flow_run_id if task else None
        now = datetime.now(UTC)
        run = flow or task
        first_start = (flow and (flow.start_time or (flow_ctx and flow_ctx.start_time))) or (
            task_ctx and (task_ctx.task_run.start_time or task_ctx.start_time)
        )
        place = str(flow.id) if flow else uuid.uuid4().hex
        return cls(
            run_id=str((flow and (flow.parent_task_run_id or flow.id)) or _caller(task_ctx)),
            flow_run_id=str(flow_run_id) if flow_run_id else None,
            task_run_id=str(task.id) if task else None,
            flow_name=flow_ctx.flow.name if flow_ctx and flow_ctx.flow else "images",
            place=f"{place}/{task.id}" if own_task and task else place,
            attempt=(
                flow.run_count if flow else 1,
                *((task.run_count,) if own_task and task else ()),
            ),
            date=(run and run.expected_start_time) or now,
            started=first_start or now,
        )

    def not_before(
        self, refresh_cache: bool | None = None, cache_expiration: timedelta | None = None
    ) -> datetime | None:
        """Return the age at which records stop to count, by Prefect's two options; None: all count.

        To refresh means to pass over what is older than this run: a retry within the run does not pay again. Where
        `refresh_cache` is None, Prefect's setting decides.
        """
        refresh = get_current_settings().tasks.refresh_cache if refresh_cache is None else refresh_cache
        if refresh:
            return self.started
        return datetime.now(UTC) - cache_expiration if cache_expiration else None

    def not_before_for(self, task_ctx: TaskRunContext | None) -> datetime | None:
        """Return `not_before` by the options of the task that is running; outside one, all records count."""
        if task_ctx is None:
            return None
        return self.not_before(task_ctx.task.refresh_cache, task_ctx.task.cache_expiration)


def _caller(task_ctx: TaskRunContext | None) -> str:
    """Return who pays outside a flow run's own context."""
    if task_ctx is None:
        return uuid.uuid4().hex
    run = task_ctx.task_run
    parents = run.task_inputs.get("__parents__", ())
    callers = [parent.id for parent in parents if isinstance(parent, TaskRunResult)]
    return str(next((caller for caller in (run.flow_run_id, *callers) if caller), run.id))


def run_log() -> Log:
    """Return the log of the run, or this package's outside runs."""
    try:
        return get_run_logger()
    except MissingContextError:
        return _logger


def named(callback: Callable[[dict[str, Any]], str]) -> TaskRunNameCallbackWithParameters:
    """Return a function of the parameters as a task run's name; Prefect's protocol asks mypy for more than it calls."""
    return cast(TaskRunNameCallbackWithParameters, callback)
