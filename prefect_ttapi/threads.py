"""Worker threads for the async twins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread
from anyio import CancelScope, CapacityLimiter
from anyio.lowlevel import RunVar

R = TypeVar("R")

#: Threads per event loop: more than a pipeline has requests in flight; `asyncio.to_thread` has 6 on two cores.
THREADS = 256
_LIMITER: RunVar[CapacityLimiter] = RunVar("ttapi_limiter")


async def in_thread(call: Callable[[], R], on_cancel: Callable[[], None] = lambda: None) -> R:
    """Run `call` in a worker thread with this context; a cancellation waits for it, because it may be paying.

    Args:
        on_cancel: called at a cancellation, to tell `call` to come to an end.
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
        with CancelScope(shield=True):
            await asyncio.wait([work])
        work.exception()  # whoever was to hear of it is gone
        raise
