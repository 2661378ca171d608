"""Threads: workers for the async twins, and one that no interruption disturbs."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Final, TypeVar

import anyio.to_thread
from anyio import CancelScope, CapacityLimiter
from anyio.lowlevel import RunVar

R = TypeVar("R")

#: Threads per event loop: more than a pipeline has requests in flight; `asyncio.to_thread` has 6 on two cores.
THREADS = 256
_LIMITER: RunVar[CapacityLimiter] = RunVar("ttapi_limiter")


async def in_thread(
    call: Callable[[], R], on_cancel: Callable[[], None] = lambda: None, grace: float | None = None
) -> R:
    """Run `call` in a worker thread with this context; a cancellation waits for it, because it may be paying.

    Args:
        on_cancel: called at a cancellation, to tell `call` to come to an end.
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
        on_cancel()
        # whoever was to hear of its error is gone
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        with CancelScope(shield=True):
            await asyncio.wait([work], timeout=grace)
        raise


#: Seconds for what is under way at an interruption: Prefect's workers kill a cancelled run 30 s after they asked it
#: to end.
GRACE: Final = 20.0

#: Seconds between looks whether undisturbed work is done: a waiting thread hears of an interruption only then.
POLL = 0.1


def undisturbed(
    work: Callable[[], None],
    interrupted: Callable[[BaseException], None],
    watch: Callable[[], None] = lambda: None,
    grace: float = math.inf,
) -> None:
    """Run `work` in a thread of its own, with this context, and wait for it.

    Ctrl-C, SIGTERM and time-outs are raised anywhere in the thread that waits; no step of `work` is left half done.
    A second interruption does not wait any longer.

    Args:
        interrupted: told of an interruption, which is raised once `work` has come to its end.
        watch: called again and again while `work` runs, to hurry it up.
        grace: seconds for which an interruption waits for that.
    """
    ended = threading.Event()
    errors: list[BaseException] = []
    context = copy_context()

    def run() -> None:
        try:
            context.run(work)
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="ttapi-work", daemon=True).start()
    try:
        _wait_for(ended, watch)
    except BaseException as interruption:
        interrupted(interruption)
        _wait_for(ended, watch, time.monotonic() + grace)
        raise
    if errors:
        raise errors[0]


def uninterrupted(
    call: Callable[[], R], interrupted: Callable[[BaseException], None], grace: float = GRACE
) -> R:
    """What `call` gives, run as `undisturbed` work."""
    results: list[R] = []
    undisturbed(lambda: results.append(call()), interrupted, grace=grace)
    return results[0]


def _wait_for(ended: threading.Event, watch: Callable[[], None], until: float = math.inf) -> None:
    while not ended.wait(POLL) and time.monotonic() < until:
        watch()
