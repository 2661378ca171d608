"""Which task runner runs the shards of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.context import FlowRunContext, TaskRunContext
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner


@contextmanager
def task_runner(slots: int) -> Iterator[TaskRunner[Any]]:
    """The flow's; inside a task threads of its own, because tasks that wait for others in one pool may fill it."""
    runner = flow_task_runner()
    if runner is not None:
        yield runner
    else:
        own: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=slots)
        with own:
            yield own


def flow_task_runner() -> TaskRunner[Any] | None:
    """The task runner of the flow that this is called in; None inside a task."""
    flow_run = FlowRunContext.get()
    return flow_run.task_runner if flow_run and TaskRunContext.get() is None else None
