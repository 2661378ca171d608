"""Interruptions: Ctrl-C, SIGTERM, time-outs and cancellations set a stop, and leave time to finish what is paid for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from traceback import format_exception_only
from typing import Any, Final, ParamSpec, TypeVar

import anyio.to_thread
from anyio import CancelScope, CapacityLimiter
from anyio.lowlevel import RunVar

from prefect_ttapi.generation.context import run_log
from prefect_ttapi.stopping import Stop

P = ParamSpec("P")
R = TypeVar("R")

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


def stop_of_caller() -> Stop | None:
    """Return the stop that a cancellation of the async caller sets; None where the caller is not async."""
    return _STOP.get()


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
        what = format_exception_only(interruption)[-1].strip()
        stop.cancel(f"{of} was interrupted: {what}", type(interruption).__name__)
        if told is not None:
            run_log().warning(f"Interrupted: {told}", grace)
        until = time.monotonic() + grace
        while not ended.wait(_POLL) and time.monotonic() < until:
            pass
        raise
    return result.result()


async def in_thread(
    call: Callable[[], R], stop: Stop | None = None, *, of: str = "the task", grace: float | None = None
) -> R:
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
        if stop is not None:
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
