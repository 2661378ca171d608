"""Requests of which the API can't have had all: nothing was paid, and they may be sent again."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from prefect_ttapi.errors import (
    APIConnectionError,
    Outcome,
)
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.wire.client import TTAPIClient
from prefect_ttapi.wire.retries import Guard
from prefect_ttapi.wire.transport import Sending
from tests.support.clocks import StoppedClock
from tests.support.hostile import (
    KEY,
    Behaviour,
    HostileServer,
    answer,
    answered,
    close,
    head,
    png,
    raw,
    reset,
    then_close,
)

CAT = ImageRequest(prompt="a cat")
GOOD = answer(200, answered(png()))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_nobody_is_listening(stopped: StoppedClock) -> None:
    """A refused connection never delivered anything: tried four times, then an error that says so."""
    stopped.sleeps.clear()
    with (
        TTAPIClient(KEY, f"http://127.0.0.1:{free_port()}", clock=stopped) as client,
        pytest.raises(APIConnectionError, match=r"no connection: .*refused") as caught,
    ):
        client.generate(CAT)
    assert (caught.value.attempts, caught.value.outcome) == (4, Outcome.NEVER_DELIVERED)
    assert caught.value.elapsed == sum(stopped.sleeps) == 7
    assert "4 attempts in 7.0 s" in str(caught.value)
    assert "not sent again: max_attempts is reached" in str(caught.value)


def test_tls_that_fails_never_delivered(server: HostileServer, stopped: StoppedClock) -> None:
    """A server that does not take part in TLS gets no request."""
    server.play(GOOD)
    address = f"https://127.0.0.1:{server.port}"
    with (
        TTAPIClient(KEY, address, max_attempts=2, connect_timeout=0.2, clock=stopped) as client,
        pytest.raises(APIConnectionError, match="no connection"),
    ):
        client.generate(CAT)
    assert server.requests == []


PROXIES = {
    "refuses": answer(502),
    "wants a password": answer(407),
    "closes": close(),
    "resets": reset(),
    "talks nonsense": raw(b"garbage\r\n\r\n"),
    "opens a way without TLS": raw(head(200) + b"no TLS"),
}


@pytest.mark.parametrize("behaviour", PROXIES.values(), ids=PROXIES)
def test_a_proxy_that_fails_never_delivered(
    behaviour: Behaviour, stopped: StoppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What breaks while a proxy is asked for the way can't have reached the API; the proxy gets no key."""
    with HostileServer(behaviour) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with (
            TTAPIClient(KEY, "https://api.ttapi.invalid", max_attempts=2, clock=stopped) as client,
            pytest.raises(APIConnectionError) as caught,
        ):
            client.generate(CAT)
        assert [request.method for request in proxy.requests] == ["CONNECT"] * 2
        assert not any(KEY in str(request) for request in proxy.requests)
    assert caught.value.outcome is Outcome.NEVER_DELIVERED


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A server that takes the beginning of a request, no more, and then resets the connection."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.recv(100)
                threading.Event().wait(0.05)
                sock.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_request_that_was_not_written_in_full(deaf_port: int, stopped: StoppedClock) -> None:
    """A request that is lost while it is written was never delivered: nobody can work on half of it."""
    long = ImageRequest(prompt="a cat", user="x" * 20_000_000)
    with (
        TTAPIClient(KEY, f"http://127.0.0.1:{deaf_port}", max_attempts=2, clock=stopped) as client,
        pytest.raises(APIConnectionError, match="while the request was being written") as caught,
    ):
        client.generate(long)
    assert caught.value.attempts == 2


@pytest.mark.parametrize(
    ("events", "unwritten"),
    [
        ([], False),
        (["connection.connect_tcp.complete"], False),
        (["http11.something_new.failed"], False),
        (["http11.send_request_headers.started", "http11.send_request_headers.failed"], True),
        (["http11.send_request_headers.complete", "http11.send_request_body.failed"], True),
        (["http11.send_request_body.complete", "http11.receive_response_headers.failed"], False),
    ],
)
def test_only_what_certainly_was_not_written_counts_as_unwritten(events: list[str], unwritten: bool) -> None:
    """Where the HTTP library's trace says nothing, or something new, the request counts as written."""
    sending = Sending(Guard())
    for event in events:
        sending(event, {})
    assert sending.unwritten is unwritten


def test_a_connection_that_was_closed_while_idle() -> None:
    """A keep-alive connection that the server closed meanwhile is replaced before anything is sent on it."""
    with (
        HostileServer(*[then_close(GOOD)] * 20, GOOD) as server,
        TTAPIClient(KEY, server.url, max_attempts=1) as client,
    ):
        for _ in range(20):
            client.generate(CAT)
            while server.open_connections:  # until the server has closed it
                threading.Event().wait(0.001)
        client.generate(CAT)
        assert (len(server.requests), server.connections) == (21, 21)
