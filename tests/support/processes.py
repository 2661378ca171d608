"""Child processes for tests: forked from a helper without threads or connections that has imported what they run."""

from __future__ import annotations

import multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.ledger.test_ledger_processes", "tests.storage.test_folder"])


def start(target: object, *arguments: object) -> multiprocessing.Process:
    """A started process that doesn't outlive the tests."""
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process
