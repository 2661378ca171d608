"""The sandbox as a context manager: counting under load, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from prefect_ttapi.sandbox import Sandbox

PATH = "/v1/images/generations"
Connect = Callable[..., httpx.Client]


def wait_until_in_flight(sandbox: Sandbox, calls: int) -> None:
    waiting = threading.Event()
    while sandbox.in_flight < calls:
        waiting.wait(0.005)


def hang(client: httpx.Client, base_url: str) -> str:
    try:
        client.post(base_url + PATH, json={"prompt": "[[sandbox:hang]]"})
    except httpx.TransportError as error:
        return type(error).__name__
    return "answered"


def test_counts_are_right_under_load(sandbox: Sandbox) -> None:
    """96 calls over 32 connections, some refused, are all counted, and paid ones apart."""

    async def ask() -> list[int]:
        key, limits = {"TT-API-KEY": "k"}, httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(
            base_url=sandbox.base_url, headers=key, limits=limits, timeout=60
        ) as client:
            bodies = [
                {"prompt": f"{number % 8}", "model": "gpt-image-2", "n": 11 if number % 3 == 0 else 2}
                for number in range(96)
            ]
            return [
                each.status_code
                for each in await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))
            ]

    statuses = asyncio.run(ask())
    assert (statuses.count(200), statuses.count(400)) == (64, 32)
    assert (sandbox.calls, sandbox.paid, sandbox.images) == (96, 64, 128)
    assert sum(sandbox.calls_by_request.values()) == sum(sandbox.paid_by_request.values()) == 64
    assert 1 <= sandbox.most_in_flight <= 32


def test_waiting_calls_do_not_hold_up_others(connect: Connect) -> None:
    """While 64 calls wait for an answer, others are served; `most_in_flight` has seen all of them."""
    with ThreadPoolExecutor(64) as threads, connect() as client:
        with Sandbox(tiny=True) as sandbox:
            hanging = [threads.submit(hang, client, sandbox.base_url) for _ in range(64)]
            wait_until_in_flight(sandbox, 64)
            assert client.post(sandbox.base_url + PATH, json={"prompt": "x"}).status_code == 200
            assert (sandbox.most_in_flight, sandbox.paid) == (65, 1)
        assert {each.result() for each in hanging} <= {"RemoteProtocolError", "ReadError"}


def test_stopping_ends_what_is_open(connect: Connect) -> None:
    """Leaving the context ends idle connections, hanging calls, long latencies, and the server's thread."""
    before = set(threading.enumerate())
    with ThreadPoolExecutor(2) as threads, connect() as client:
        with Sandbox(tiny=True) as sandbox:
            drawn = client.post(sandbox.base_url + PATH, json={"prompt": "x", "response_format": "b64_json"})
            assert drawn.status_code == 200
            slow = {"prompt": "[[sandbox:latency=600]]"}
            hanging = threads.submit(hang, client, sandbox.base_url)
            late = threads.submit(client.post, sandbox.base_url + PATH, json=slow)
            wait_until_in_flight(sandbox, 2)
        assert hanging.result() != "answered"
        assert isinstance(late.exception(), httpx.TransportError)
        with pytest.raises(httpx.ConnectError):
            client.get(f"{sandbox.base_url}/stats")
    assert set(threading.enumerate()) <= before


def test_a_sandbox_can_be_opened_again(connect: Connect) -> None:
    """The same object serves again after it was closed, and goes on counting."""
    sandbox = Sandbox(tiny=True)
    for calls in (1, 2):
        with sandbox, connect(base_url=sandbox.base_url) as client:
            client.post(PATH, json={"prompt": "x"})
        assert sandbox.calls == calls


def test_reset_keeps_what_is_in_flight(connect: Connect) -> None:
    """After a reset counts start from zero, but a call in flight is still in flight."""
    with ThreadPoolExecutor(1) as threads, connect() as client, Sandbox() as sandbox:
        threads.submit(hang, client, sandbox.base_url)
        wait_until_in_flight(sandbox, 1)
        sandbox.reset()
        assert (sandbox.calls, sandbox.paid, sandbox.in_flight, sandbox.most_in_flight) == (0, 0, 1, 1)
        assert (sandbox.requests, sandbox.calls_by_request) == ([], {})


def test_a_busy_port_is_an_error() -> None:
    """Where nothing can listen, entering raises OSError, and nothing was started."""
    threads = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sandbox = Sandbox(port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            sandbox.__enter__()
    assert threading.active_count() == threads


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1"])  # noqa: S104
def test_base_url_can_be_called(connect: Connect, host: str) -> None:
    """Whatever address it listens at, `base_url` leads to it."""
    with Sandbox(host=host) as sandbox, connect(base_url=sandbox.base_url) as client:
        assert client.get("/stats").json()["calls"] == 0
