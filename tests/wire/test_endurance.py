"""Many requests at once, and many failures in a row."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_ttapi.errors import TTAPIError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.wire.client import TTAPIClient
from tests.support.hostile import (
    KEY,
    HostileServer,
    Wire,
    answer,
    answered,
    close,
    cut,
    png,
    raw,
    reset,
)

CAT = ImageRequest(prompt="a cat")
BODY = answered(png())


def test_32_threads_on_one_client(server: HostileServer, client: TTAPIClient) -> None:
    """Each of 320 requests from 32 threads gets its own answer, and all 32 are in flight together."""
    together = threading.Barrier(32, timeout=30)

    def behave(wire: Wire) -> bool:
        if wire.request.json["n"] == 2:
            together.wait()
        width = int(wire.request.json["prompt"])
        return answer(200, answered(png(width, 1), png(width, 2)))(wire)

    def widths(number: int) -> list[int]:
        request = ImageRequest(prompt=str(number + 1), n=2 if number < 32 else 3)
        return [image.width for image in client.generate(request).images]

    server.play(behave)
    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(widths, range(320))) == [[number + 1] * 2 for number in range(320)]


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_failures_leak_nothing(server: HostileServer) -> None:
    """After 500 failures of all kinds no connection, spool file or other handle is left open."""
    large = answered(png(noise=100_000))
    kinds = (
        answer(400, {"message": "no"}),
        answer(200, {"data": []}),
        cut(large, 120_000),
        cut(large, 120_000, reset=True),
        close(),
        reset(),
        raw(b"nonsense\r\n\r\n"),
        answer(302, b"", {"Location": "http://["}),
        answer(200, answered(png(noise=100_000)[:-5])),
        answer(413, b"x" * 200_000),
    )
    with TTAPIClient(KEY, server.url, max_attempts=1) as client:
        before = open_files()
        server.play(*kinds * 50)
        for _ in range(500):
            with pytest.raises(TTAPIError):
                client.generate(CAT)
        server.play(answer(200, BODY))
        client.generate(CAT)
    # a kind that leaks leaves fifty; this process may open one or two for something else meanwhile
    assert open_files() < before + 25
    assert len(server.requests) == 1
