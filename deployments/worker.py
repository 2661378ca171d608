"""A worker of a process pool that ends after its runs, in place of `prefect worker start --pool images --type process`.

    python deployments/worker.py --pool images

Told to end, `prefect worker start` kills its runs at once: what they have sent is paid for and lost. This worker takes
no more runs, hands SIGTERM on to those that it has, and waits until each of them has recorded what is under way. They
are then scheduled again, and the next worker goes on with them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
from typing import Any

import anyio
from anyio.abc import TaskStatus
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult


class Configuration(ProcessJobConfiguration):
    """Starts runs by a command that can give a run back to the server, for another worker to go on with."""

    def prepare_for_flow_run(self, *args: Any, **kwargs: Any) -> None:
        """Set the command where a deployment has none of its own."""
        self.command = self.command or shlex.join([sys.executable, "-m", "prefect", "flow-run", "execute"])
        self.env.setdefault("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "reschedule")
        super().prepare_for_flow_run(*args, **kwargs)


class Worker(ProcessWorker):
    """Hands SIGTERM on to its runs, and waits for them."""

    job_configuration = Configuration

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run a flow run in a process of its own; where the worker ends meanwhile, end the process in order."""
        results: list[ProcessWorkerResult] = []

        async def to_its_end(*, task_status: TaskStatus[int]) -> None:
            with anyio.CancelScope(shield=True):
                results.append(await super(Worker, self).run(flow_run, configuration, task_status))
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            with anyio.CancelScope(shield=True):
                pid = await group.start(to_its_end)
            if task_status is not None:
                task_status.started(pid)
            try:
                await anyio.sleep_forever()
            finally:
                if not results:
                    os.kill(pid, signal.SIGTERM)
        return results[0]


async def work(**options: Any) -> None:
    """Work until SIGTERM or Ctrl-C."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await Worker(**options).start(with_healthcheck=True)


def main() -> None:
    """Work for the pool that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--pool", default="images", help="The work pool to take runs from. It is made if there is none."
    )
    parser.add_argument("--limit", type=int, help="How many runs may be under way at once.")
    options = parser.parse_args()
    try:
        asyncio.run(work(work_pool_name=options.pool, limit=options.limit))
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("The worker has ended, after its runs.")


if __name__ == "__main__":
    main()
