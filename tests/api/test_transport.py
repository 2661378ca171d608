"""What goes wrong on the way, what was surely not delivered, and what comes of it; sends are counted there."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import httpcore
import pytest

from prefect_ttapi import errors
from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.outcomes import Again, ErrorBody, judge
from prefect_ttapi.api.retries import Guard
from prefect_ttapi.api.transport import UNWRITTEN, WRITING, Sending
from prefect_ttapi.errors import (
    APIConnectionError,
    InvalidResponseError,
    Outcome,
    TTAPIError,
    UnknownOutcomeError,
)
from prefect_ttapi.requests import ImageRequest
from tests.support.clocks import StoppedClock
from tests.support.hostile import (
    KEY,
    Behaviour,
    HostileServer,
    Wire,
    answer,
    answered,
    close,
    cut,
    head,
    png,
    raw,
    reset,
    stall,
)
from tests.support.ports import free_ports

MakeClient = Callable[..., TTAPIClient]

CAT = ImageRequest(prompt="a cat")
GOOD = answer(200, answered(png()))

STATUSES = [
    *(
        300,
        301,
        302,
        303,
        304,
        307,
        308,
        400,
        401,
        402,
        403,
        404,
        405,
        408,
        409,
        418,
        413,
        415,
        422,
        425,
        429,
        451,
        499,
    ),
    *(500, 501, 502, 503, 504, 505, 507, 520, 521, 522, 523, 524, 525, 530, 599),
]
SHAPES: dict[str, tuple[bytes, str, str]] = {
    "vendor": (b'{"status": "FAILED", "message": "said so", "data": null}', "application/json", "said so"),
    "openai": (b'{"error": {"message": "said so", "type": "x"}}', "application/json", "said so"),
    "html": (b"<html><title>x</title><body>said so</body></html>", "text/html", "x said so"),
    "text": (b"said so", "text/plain", "said so"),
    "empty": (b"", "application/json", "no message"),
    "broken": (b'{"error": {"mess', "application/json", '{"error": {"mess'),
    "binary": (b"\xff\xfe\x00\x01", "application/json", "\ufffd\ufffd"),
}
HEADERS: dict[str, dict[str, str]] = {
    "none": {},
    "retry-after": {"Retry-After": "7"},
    "request id": {"X-Request-Id": "req-7"},
    "gzip": {"Content-Encoding": "gzip"},
    "location": {"Location": "http://127.0.0.1:1/elsewhere"},
    "broken location": {"Location": "http://["},
}


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_in_every_shape(
    server: HostileServer, client: TTAPIClient, stopped: StoppedClock, status: int
) -> None:
    """Status x shape x header: where words say nothing, the status decides the error's class and how often is sent."""
    for body, content_type, message in SHAPES.values():
        verdict = judge(status, ErrorBody("", page="html" in content_type))
        sends = {Again.FREELY: 4, Again.TWICE: 3, Again.OPTED_IN: 1, Again.NEVER: 1}[verdict.again]
        for name, headers in HEADERS.items():
            sent = gzip.compress(body) if name == "gzip" else body
            server.play(answer(status, sent, {"Content-Type": content_type, **headers}))
            stopped.sleep(7)  # what the API asked of the request before
            stopped.sleeps.clear()
            with pytest.raises(TTAPIError) as caught:
                client.generate(CAT)
            error = caught.value
            assert type(error) is verdict.error
            assert error.status_code == status
            assert error.message == message or status < 400
            assert error.outcome is verdict.error.outcome
            assert error.attempts == len(server.requests) == sends
            assert error.request_id == ("req-7" if name == "request id" else None)
            assert error.retry_after == (7 if name == "retry-after" and status >= 400 else None)
            assert stopped.sleeps == [wait + (error.retry_after or 0) for wait in (1, 2, 4)][: sends - 1]


FAULTS: dict[str, tuple[Behaviour, type[TTAPIError], str]] = {
    "no credit": (
        answer(429, {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}),
        errors.InsufficientBalanceError,
        "refused for good",
    ),
    "no credit, under 200": (
        answer(200, {"status": "FAILED", "message": "Insufficient balance, please recharge", "data": None}),
        errors.InsufficientBalanceError,
        "HTTP 200, taken for a lack of credit, as it says 'please recharge', outcome: refused for good",
    ),
    "account": (
        answer(
            400, {"error": {"message": "Your resource has been temporarily blocked.", "code": "Forbidden"}}
        ),
        errors.AuthenticationError,
        "refused for good",
    ),
    "prompt": (
        answer(422, {"error": {"message": "no", "code": "content_policy_violation"}}),
        errors.ModerationError,
        "refused for good",
    ),
    "prompt, as an event": (
        answer(
            200,
            b'event: error\ndata: {"type": "error", "error": {"code": "moderation_blocked", "message": "no"}}\n\n',
            {"Content-Type": "text/event-stream"},
        ),
        errors.ModerationError,
        "refused for good",
    ),
    "prompt, by Azure": (
        answer(400, {"error": {"message": "no", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
        errors.ModerationError,
        "refused for good",
    ),
    "model": (
        answer(403, {"error": {"message": "no", "code": "model_not_permitted"}}),
        errors.ModelNotPermittedError,
        "refused for good",
    ),
    "firewall": (
        answer(403, b"<h1>Sorry, you have been blocked</h1>", {"Content-Type": "text/html"}),
        errors.InvalidRequestError,
        "refused for good",
    ),
    "prompt, repeated": (
        answer(400, {"error": {"message": "too long: insufficient balance of a cat"}}),
        errors.InvalidRequestError,
        "refused for good",
    ),
    "unknown": (
        answer(418, b"tea"),
        errors.InvalidRequestError,
        "taken for a refusal of this request: 4xx that",
    ),
    "unknown, under 200": (
        answer(200, {"status": "FAILED", "message": "no"}),
        InvalidResponseError,
        "an error that is not in the table, outcome: answered but unusable",
    ),
    "late": (answer(408), UnknownOutcomeError, "outcome: unknown, not sent again: it may be paid"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("streamed", [False, True])
def test_whose_fault_it_is(server: HostileServer, client: TTAPIClient, name: str, streamed: bool) -> None:
    """One send tells, under whatever status, with or without a stream; the error says whether it may be paid."""
    behaviour, kind, words = FAULTS[name]
    server.play(behaviour)
    request = ImageRequest(prompt="insufficient balance of a cat", model="gpt-image-1")
    with pytest.raises(TTAPIError) as caught:
        list(client.stream(request)) if streamed else client.generate(request)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [425, 521, 523, 525, 526, 530])
def test_what_never_reached_the_origin_is_sent_again(
    server: HostileServer, client: TTAPIClient, status: int
) -> None:
    """It can't be paid, and the answer to the next send counts."""
    server.play(answer(status), answer(status), GOOD)
    assert client.generate(CAT).earlier_outcomes == (Outcome.NEVER_DELIVERED,) * 2


def test_a_limit_under_200_is_waited_for(server: HostileServer, client: TTAPIClient) -> None:
    """An answer that tells of too many requests is sent again like a 429."""
    server.play(answer(200, {"status": "FAILED", "message": "Too many requests", "data": None}), GOOD)
    assert client.generate(CAT).earlier_outcomes == (Outcome.REJECTED,)


BODY = json.dumps(answered(png())).encode()
LENGTH = {"Content-Length": str(len(BODY))}
CHUNKED = {"Transfer-Encoding": "chunked"}
LOST = {
    "closed without an answer": close(),
    "reset without an answer": reset(),
    "cut in the status line": raw(b"HTTP/1.1 20"),
    "cut in the headers": raw(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "no HTTP": raw(b"hello\r\n\r\n"),
    "closed before the body": cut(BODY, 0),
    "cut in the body": cut(BODY, 100),
    "reset in the body": cut(BODY, 100, reset=True),
    "cut in a chunk": raw(head(200, CHUNKED) + b"ffff\r\n" + BODY[:100]),
    "the JSON ends early": answer(200, BODY[:100]),
    "half a gzip": answer(200, gzip.compress(BODY)[:50], {"Content-Encoding": "gzip"}),
    "no chunk size": raw(head(200, CHUNKED) + b"zz\r\n"),
    "cut without a length": raw(head(200) + BODY[:100]),
    "closed without a length": raw(head(200)),
    "silent": stall(),
    "silent in the headers": stall(b"HTTP/1.1 200 OK\r\n"),
    "silent in the body": stall(head(200, LENGTH) + BODY[:100]),
    "silent after a continue": stall(head(100)),
    "headers without an end": raw(b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 20_000),
}


@pytest.mark.parametrize("behaviour", LOST.values(), ids=LOST)
def test_what_is_lost_after_sending_is_not_sent_again(
    server: HostileServer, make_client: MakeClient, behaviour: Behaviour
) -> None:
    """Cut, reset, silent or lying: the outcome is unknown; a second send is for who opted in."""
    server.play(behaviour, GOOD)
    with pytest.raises(UnknownOutcomeError) as caught:
        make_client(read_timeout=0.2).generate(CAT)
    assert len(server.requests) == 1
    assert caught.value.outcome is Outcome.UNKNOWN
    assert "retry_unknown_outcome is off" in str(caught.value)
    server.play(behaviour, GOOD)
    result = make_client(read_timeout=0.2, retry_unknown_outcome=True).generate(CAT)
    assert len(server.requests) == result.attempts == 2
    assert result.earlier_outcomes == (Outcome.UNKNOWN,)


def test_a_stalled_error_body_costs_no_outcome(server: HostileServer, make_client: MakeClient) -> None:
    """The status of an error counts, also where its body never comes."""
    for behaviour in (
        stall(head(402, {"Content-Length": "9"}) + b"no"),
        raw(head(402, {"Content-Length": "9"})),
        raw(head(402, {"Transfer-Encoding": "chunked"}) + b"zz"),
        raw(head(402) + b"no" * 100_000),
    ):
        server.play(behaviour)
        with pytest.raises(errors.InsufficientBalanceError):
            make_client(read_timeout=0.2).generate(CAT)


def test_an_endless_error_body_is_left(server: HostileServer, client: TTAPIClient) -> None:
    """Of an error's body no more is read than its words can take."""

    def behave(wire: Wire) -> bool:
        wire.send(head(400))
        while True:  # until the client hangs up
            wire.send(b"no " * 10_000)

    server.play(behave)
    with pytest.raises(errors.InvalidRequestError, match="no no no"):
        client.generate(CAT)


def test_a_redirect_is_not_followed(server: HostileServer, client: TTAPIClient) -> None:
    """The key goes to `base_url` only: a redirect is an error, and nobody else hears of the request."""
    with HostileServer(GOOD) as elsewhere:
        server.play(answer(307, b"", {"Location": elsewhere.url + "/v1/images/generations"}))
        with pytest.raises(InvalidResponseError, match="never followed"):
            client.generate(CAT)
        assert (elsewhere.connections, len(server.requests)) == (0, 1)


def test_nobody_is_listening(stopped: StoppedClock) -> None:
    """A refused connection never delivered anything: tried four times, then an error that says so."""
    stopped.sleeps.clear()
    (port,) = free_ports(1)
    with (
        TTAPIClient(KEY, f"http://127.0.0.1:{port}", clock=stopped) as client,
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


class FailingStream(httpcore.NetworkStream):
    """A connection on which a write fails, the first or a later one."""

    def __init__(self, writes: int) -> None:
        self._writes = writes

    def write(self, *_: object, **__: object) -> None:
        self._writes -= 1
        if self._writes < 0:
            raise httpcore.WriteError("broken pipe")

    def read(self, *_: object, **__: object) -> bytes:
        return b""

    def close(self) -> None:
        pass

    def get_extra_info(self, _: str) -> None:
        return None


class FailingBackend(httpcore.NetworkBackend):
    def __init__(self, writes: int) -> None:
        self._writes = writes

    def connect_tcp(self, *_: object, **__: object) -> httpcore.NetworkStream:
        return FailingStream(self._writes)


def test_httpcore_names_its_events_as_we_know_them() -> None:
    """The trace that decides what was not paid: its names are documented, and may change with httpcore's version."""
    seen: set[str] = set()
    for writes in (0, 1):
        pool = httpcore.ConnectionPool(network_backend=FailingBackend(writes))
        trace = {"trace": lambda event, _: seen.add(event.partition(".")[2])}
        with pool, pytest.raises(httpcore.RemoteProtocolError):
            pool.request("POST", "http://api.example/", content=b"{}", extensions=trace)
    assert {WRITING, *UNWRITTEN} <= seen


def test_each_request_has_a_connection_of_its_own() -> None:
    """No request is under way on a connection that somebody else, who takes it for idle, may close."""
    with HostileServer(GOOD) as server, TTAPIClient(KEY, server.url, max_attempts=1) as client:
        for _ in range(5):
            client.generate(CAT)
        assert (len(server.requests), server.connections) == (5, 5)
        assert {request.headers["connection"] for request in server.requests} == {"close"}
