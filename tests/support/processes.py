"""Child processes for tests: forked from a helper without threads or connections, which has imported us already."""

from __future__ import annotations

import multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.support.generations", "prefect_ttapi.ledger.ledger"])


def start(target: object, *arguments: object) -> multiprocessing.Process:
    """A started process that doesn't outlive the tests."""
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process
