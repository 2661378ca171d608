"""Worker threads for the async twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

R = TypeVar("R")

#: Threads per event loop: more than a pipeline has requests in flight; `asyncio.to_thread` has 6 on two cores.
THREADS = 256
_LIMITER: RunVar[CapacityLimiter] = RunVar("ttapi_limiter")


async def in_thread(call: Callable[[], R]) -> R:
    """Run `call` in a worker thread with this context; a cancellation waits for it, because it may be paying."""
    try:
        limiter = _LIMITER.get()
    except LookupError:
        limiter = CapacityLimiter(THREADS)
        _LIMITER.set(limiter)
    return await anyio.to_thread.run_sync(call, limiter=limiter)
