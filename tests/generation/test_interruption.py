"""Worker threads of the async twins: what a cancellation waits for, and for how long."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from prefect_ttapi.generation.runs import in_thread, to_the_end
from prefect_ttapi.stopping import Stop


@pytest.mark.parametrize("again", [False, True], ids=["out of patience", "cancelled again"])
def test_a_cancellation_waits_as_long_as_it_may(again: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The call is told to end and goes on; after the grace, or a second cancellation, nobody complains of its error."""
    stop, end, ended = Stop(), threading.Event(), threading.Event()

    def call() -> None:
        end.wait(30)
        ended.set()
        raise ValueError("nobody hears this")

    async def cancelled() -> None:
        work = asyncio.create_task(in_thread(call, stop, of="the task", grace=None if again else 0.05))
        await asyncio.sleep(0.05)
        work.cancel()
        await asyncio.sleep(0.05)
        if again:
            assert not work.done()
            work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert (stop.reason, stop.cancelled) == ("the task was cancelled", True)
        assert not ended.is_set()
        end.set()
        await asyncio.to_thread(ended.wait, 30)
        await asyncio.sleep(0.05)

    asyncio.run(cancelled())
    assert caplog.text == ""


def test_an_interruption_at_the_very_beginning_stops_the_work() -> None:
    """Also one that comes while the thread is being started is raised only once the work has come to its end."""
    stop, ended = Stop(), threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        stop.wait(5)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        to_the_end(work, stop, of="the batch")
    assert stop.cancelled
    assert ended.is_set()
