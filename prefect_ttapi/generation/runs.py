"""What a run is (who pays, where it files what it leaves, which attempt it is), and what its interruption does.

Ctrl-C, SIGTERM, time-outs and cancellations set a stop, and leave time to finish what is paid for.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial, wraps
from pathlib import Path
from tempfile import gettempdir
from traceback import format_exception_only
from typing import Any, Final, ParamSpec, Self, TypeVar

import anyio.to_thread
import httpx
import prefect.runtime
from anyio import CancelScope, CapacityLimiter
from anyio.lowlevel import RunVar
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import TaskRunResult
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError, ObjectNotFound
from prefect.logging import get_run_logger
from prefect.settings import get_current_settings

from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.temporary_server import interrupted
from prefect_ttapi.ledger.documents import Log
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.store import ImageStore

P = ParamSpec("P")
R = TypeVar("R")

_logger: Final = logging.getLogger(__name__)

#: Seconds for what is under way at an interruption: Prefect's workers kill a cancelled run 30 s after they asked it
#: to end.
GRACE: Final = 20.0

#: Seconds between looks whether undisturbed work is done: a waiting thread hears of an interruption only then.
_POLL: Final = 0.1

#: Threads per event loop: more than a pipeline has requests in flight; `asyncio.to_thread` has 6 on two cores.
THREADS: Final = 256
_LIMITER: RunVar[CapacityLimiter] = RunVar("ttapi_limiter")

#: How a cancellation reaches what runs in a worker thread of an async flow.
_STOP: ContextVar[Stop | None] = ContextVar("ttapi_stop", default=None)


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
        run, run_ctx = (flow, flow_ctx) if flow else (task, task_ctx)
        own_task = task if task and flow and task.flow_run_id == flow.id else None
        flow_run_id = flow.id if flow else task.flow_run_id if task else None
        place = str(flow.id) if flow else uuid.uuid4().hex
        now = datetime.now(UTC)
        return cls(
            run_id=str((flow and (flow.parent_task_run_id or flow.id)) or _caller(task_ctx)),
            flow_run_id=str(flow_run_id) if flow_run_id else None,
            task_run_id=str(task.id) if task else None,
            flow_name=flow_ctx.flow.name if flow_ctx and flow_ctx.flow else "images",
            place=f"{place}/{own_task.id}" if own_task else place,
            attempt=(flow.run_count if flow else 1, *((own_task.run_count,) if own_task else ())),
            date=(run and run.expected_start_time) or now,
            started=(run and run.start_time) or (run_ctx and run_ctx.start_time) or now,
        )

    def not_before(self, refresh_cache: bool | None, cache_expiration: timedelta | None) -> datetime | None:
        """Return the time before which records don't count, by Prefect's two options; None: all count.

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


def stop_of_caller() -> Stop | None:
    """Return the stop that a cancellation of the async caller sets; None where the caller is not async."""
    return _STOP.get()


def why_interrupted(of: str, by: BaseException) -> tuple[str, str]:
    """Return the reason of a stop where something was interrupted by an error, and the error's type."""
    return f"{of} was interrupted: {format_exception_only(by)[-1].strip()}", type(by).__name__


def to_the_end(
    work: Callable[[], R],
    stop: Stop,
    *,
    of: str,
    grace: float = GRACE,
    told: str | None = "what is under way, and paid, has %.0f s to be finished and recorded",
) -> R:
    """Run `work` in a thread of its own, with this context, and return what it returns.

    Ctrl-C, SIGTERM and time-outs are raised anywhere in the thread that waits; no step of `work` is left half done.
    An interruption cancels `stop`, waits for `work` to come to its end, and is raised then. A second one does not
    wait any longer.

    Args:
        of: what is interrupted, for the stop's reason: `the batch`.
        grace: seconds for which an interruption waits.
        told: what the log says of them; None: nothing.
    """
    ended, result = threading.Event(), Future[R]()
    context = copy_context()

    def run() -> None:
        try:
            result.set_result(context.run(work))
        except BaseException as error:
            result.set_exception(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="ttapi-work", daemon=True)
    try:
        thread.start()  # not before: it waits for the thread, and may be interrupted as well
        while not ended.wait(_POLL):
            pass
    except BaseException as interruption:
        stop.cancel(*why_interrupted(of, interruption))
        if told is not None:
            run_log().warning(f"Interrupted: {told}", grace)
        until = time.monotonic() + grace
        with interrupted(interruption):
            while not ended.wait(_POLL) and time.monotonic() < until:
                pass
        raise
    return result.result()


async def in_thread(call: Callable[[], R], stop: Stop, *, of: str, grace: float | None) -> R:
    """Run `call` in a worker thread with this context; a cancellation waits for it, because it may be paying.

    Args:
        stop: cancelled at a cancellation, to bring `call` to an end.
        of: what is cancelled, for the stop's reason.
        grace: seconds for which a cancellation waits for that; None: as long as it takes.
    """
    try:
        limiter = _LIMITER.get()
    except LookupError:
        limiter = CapacityLimiter(THREADS)
        _LIMITER.set(limiter)
    # a task of its own: neither asyncio's cancellation nor that of anyio's scopes reaches it
    work = asyncio.ensure_future(anyio.to_thread.run_sync(call, limiter=limiter))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.cancel(f"{of} was cancelled", "CancelledError")
        # whoever was to hear of its error is gone
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        with CancelScope(shield=True):
            await asyncio.wait([work], timeout=grace)
        raise


def async_twin(
    function: Callable[P, R], *, of: str, grace: float | None = None
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Return `function` for async flows: it runs in a worker thread, and a cancellation sets `stop_of_caller`.

    Args:
        function: what the twin does, with the same arguments, result and errors.
        of: what is cancelled, for the stop's reason.
        grace: seconds for which a cancellation waits; None: as long as it takes.
    """

    @wraps(function)
    async def twin(*args: P.args, **kwargs: P.kwargs) -> R:
        stop = Stop()
        token = _STOP.set(stop)
        try:
            return await in_thread(partial(function, *args, **kwargs), stop, of=of, grace=grace)
        finally:
            _STOP.reset(token)

    twin.__name__ = twin.__qualname__ = f"a{function.__name__}"
    twin.__doc__ = f"""Do as `{function.__name__}`, for async flows: same arguments, result and errors.

    A cancellation or a time-out sends nothing more, and waits for what is under way.
    """
    return twin


#: Pull steps that make the folder in which a run works; what is copied to a worker without one has no step.
_MAKES_FOLDER: Final = re.compile(r"(a?git_clone|pull_\w+)")
#: A folder that a person names, as it is or by a variable.
_NAMED_FOLDER: Final = re.compile(r"[/~]|{{ *(\$|prefect\.)")

#: Why nothing is sent where a place is deleted after the run, and the way out.
_STORE_STAYS: Final = (
    "every run would pay for its images again, so nothing was sent. Name a place that stays, in the deployment's "
    "parameters: s3://bucket/prefix, block:NAME, or a folder by its whole path elsewhere"
)
_RESCUE_STAYS: Final = (
    "an answer that the store does not take would be lost with it, so nothing was sent. Name a place that stays: set "
    "the store's rescue_folder, or XDG_STATE_HOME, to a folder by its whole path elsewhere"
)


def must_outlive_the_run(*places: ImageStore | Path | None) -> None:
    """Make sure that no store, and no rescue folder, lies where a deployment's code was pulled to for this run.

    Such a folder is deleted after the run, or when its code can't be brought up to date, and with it what was paid for.

    Args:
        places: stores, and rescue folders by their paths.

    Raises:
        StoreError: one does.
    """
    pulled = _top(Path.cwd().resolve())
    for place in (place for place in places if place is not None):
        if isinstance(place, ImageStore):
            folder, what, way_out = Path(place.url), "the store", _STORE_STAYS
        else:
            folder, what, way_out = place, "the rescue folder", _RESCUE_STAYS
        is_inside = folder.is_absolute() and folder.resolve().is_relative_to(pulled)
        if is_inside and (run_id := prefect.runtime.flow_run.id) and _was_pulled(run_id):
            raise StoreError(
                f"{what} {folder} is in {pulled}, where the deployment's code was put for this run, and which is "
                f"deleted after it: {way_out}"
            )


def _top(folder: Path) -> Path:
    """Return the folder that is deleted if this one is: its repository, or what is temporary of its path."""
    temporary = Path(gettempdir()).resolve()
    if folder != temporary and folder.is_relative_to(temporary):
        return temporary / folder.relative_to(temporary).parts[0]
    return next((each for each in (folder, *folder.parents) if (each / ".git").exists()), folder)


@lru_cache(maxsize=64)
def _was_pulled(flow_run_id: str) -> bool:  # noqa: ARG001 - it is what the answer is remembered by
    try:
        deployment_id = prefect.runtime.deployment.id
        if deployment_id is None:
            return False
        with get_client(sync_client=True) as client:
            return pulls_its_code(client.read_deployment(deployment_id), Path.cwd().resolve())
    except (httpx.HTTPError, ObjectNotFound) as error:
        raise StoreError(
            f"nothing is sent: the Prefect server can't be asked where the code of this run comes from ({error})"
        ) from error


def pulls_its_code(deployment: DeploymentResponse, folder: Path) -> bool:
    """Return whether a run that works in `folder` does so because its code was put there for it."""
    for step in reversed(deployment.pull_steps or []):
        for name, inputs in step.items():
            kind = name.rpartition(".")[2]
            if _MAKES_FOLDER.fullmatch(kind):
                return True
            if kind == "set_working_directory" and _NAMED_FOLDER.match(str(inputs.get("directory", ""))):
                return False
    # without a step, a worker copies the code to a temporary folder; `serve` runs it where `serve` was started
    by_worker = bool(deployment.work_pool_name) and folder.is_relative_to(Path(gettempdir()).resolve())
    return by_worker or "$STORAGE_BASE_PATH" in (deployment.path or "")
