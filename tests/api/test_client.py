"""What TTAPIClient sends, the images it gives, many requests at once, and many failures in a row."""

from __future__ import annotations

import gc
import gzip
import inspect
import logging
import os
import pickle
import tempfile
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.transport import decoded
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import InvalidResponseError, Outcome, TTAPIError
from prefect_ttapi.requests import ImageRequest
from tests.support.hostile import (
    KEY,
    Behaviour,
    HostileServer,
    Wire,
    answer,
    answered,
    b64,
    close,
    cut,
    drip,
    head,
    png,
    raw,
    reset,
)

MakeClient = Callable[..., TTAPIClient]

CAT = ImageRequest(prompt="a cat")
MANY = ImageRequest(prompt="cats", n=10)


def test_the_request_is_what_the_vendor_documents(server: HostileServer, client: TTAPIClient) -> None:
    """One POST with the key in its header, JSON that differs from the defaults, and never `stream`."""
    server.play(answer(200, answered(png())))
    client.generate(ImageRequest(prompt="ein Käfer 🐞", model="gpt-image-1", stream=True, partial_images=2))
    (received,) = server.requests
    assert (received.method, received.path) == ("POST", "/v1/images/generations")
    assert received.json == {"model": "gpt-image-1", "prompt": "ein Käfer 🐞"}
    assert received.headers["tt-api-key"] == KEY
    assert received.headers["accept-encoding"] == "identity"
    assert "authorization" not in received.headers


def test_no_proxy_hears_of_a_request_to_this_machine(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain http through a proxy of the environment would show it the key: requests to loopback go straight."""
    server.play(answer(200, answered(png())))
    with HostileServer(answer(200, answered(png()))) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        with TTAPIClient(KEY, server.url) as client:
            client.generate(CAT)
        assert (proxy.connections, len(server.requests)) == (0, 1)


def test_no_cookies_are_kept(server: HostileServer, client: TTAPIClient) -> None:
    """What a server wants to be remembered is forgotten: it could spoil every later request."""
    server.play(answer(200, answered(png()), {"Set-Cookie": "a=1; Path=/", "X": "1"}))
    client.generate(CAT)
    client.generate(CAT)
    assert "cookie" not in server.requests[1].headers


def test_images_and_facts(server: HostileServer, client: TTAPIClient) -> None:
    """Bytes, type and size come from the image itself; usage, time stamp and id from the answer."""
    small, large = png(32, 16), png(64, 48, noise=300_000)
    usage = {"input_tokens": 9, "output_tokens": 4160, "total_tokens": 4169, "new_field": 1}
    document = answered(small, large, usage=usage)
    document["data"][1] |= {"revised_prompt": "two cats", "url": None}
    server.play(answer(200, document, {"X-Request-Id": "req-1"}))
    result = client.generate(ImageRequest(prompt="cats", n=2))
    assert [image.read_bytes() for image in result.images] == [small, large]
    assert [(i.media_type, i.width, i.height, i.index) for i in result.images] == [
        ("image/png", 32, 16, 0),
        ("image/png", 64, 48, 1),
    ]
    assert result.images[1].revised_prompt == "two cats"
    assert result.usage.total_tokens == 4169
    assert (result.created, result.attempts, result.request_id) == (1745818538, 1, "req-1")
    assert result.earlier_outcomes == ()


def test_images_outlive_the_client(server: HostileServer) -> None:
    """An image is readable after its client is closed, and a closed client leaves no connection open."""
    server.play(answer(200, answered(png(noise=200_000))))
    with TTAPIClient(SecretStr(KEY), server.url + "/") as client:
        image = client.generate(CAT).images[0]
    assert image.open().read() == png(noise=200_000)
    assert image.sha256


def test_the_older_wrapper(server: HostileServer, client: TTAPIClient) -> None:
    """The vendor's older envelope around the same answer is read like the newer one."""
    server.play(answer(200, {"status": "SUCCESS", "message": "ok", "data": answered(png())}))
    result = client.generate(CAT)
    assert result.images[0].read_bytes() == png()
    assert result.created == 1745818538


def test_fewer_images_than_asked_for_are_a_warning(
    server: HostileServer, client: TTAPIClient, caplog: pytest.LogCaptureFixture
) -> None:
    """What was paid is given, and the log says what is missing."""
    server.play(answer(200, answered(png(), png())))
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        assert len(client.generate(MANY).images) == 2
    assert f"{MANY.request_hash[:12]}: 10 images were asked for, 2 came" in caplog.messages


def test_a_bad_image_costs_no_other(
    server: HostileServer, client: TTAPIClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Of several paid images, the good ones are given, and the log says what was wrong with the others."""
    items = answered(png(1, 1), b"<html>no</html>", png(2, 2))["data"]
    server.play(answer(200, {"data": [*items, {"b64_json": None}]}))
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        images = client.generate(ImageRequest(prompt="cats", n=4)).images
    assert [(image.index, image.width) for image in images] == [(0, 1), (1, 2)]
    assert any("item 3" in message and "web page" in message for message in caplog.messages)


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "deflate", "identity"])
def test_an_encoding_nobody_asked_for_is_undone(
    server: HostileServer, client: TTAPIClient, encoding: str
) -> None:
    """Compressed answers are read as well, gzip in several parts too."""
    body = answer_bytes = b'{"data": [{"b64_json": "%s"}]}' % b64(png(noise=200_000)).encode()
    if "gzip" in encoding.lower():
        body = gzip.compress(answer_bytes[:1000]) + gzip.compress(answer_bytes[1000:])
    elif encoding == "deflate":
        body = zlib.compress(answer_bytes)
    server.play(answer(200, body, {"Content-Encoding": encoding}))
    assert client.generate(CAT).images[0].read_bytes() == png(noise=200_000)


def chunked(data: bytes, size: int) -> bytes:
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


BODY = b'{"data": [{"b64_json": "%s"}]}' % b64(png()).encode()
LAWFUL = {
    "every byte for itself": drip(BODY),
    "no length": raw(head(200) + BODY),
    "HTTP/1.0": raw(b"HTTP/1.0 200 OK\r\n\r\n" + BODY),
    "chunked": raw(head(200, {"Transfer-Encoding": "chunked"}) + chunked(BODY, 7)),
    "continue first": raw(head(100) + head(103, {"Link": "</x>"}) + head(200) + BODY),
    "wrong content type": answer(200, BODY, {"Content-Type": "text/html"}),
    "status 201": answer(201, BODY),
    "byte-order mark": answer(200, b"\xef\xbb\xbf" + BODY),
    "no reason phrase": raw(b"HTTP/1.1 200\r\n\r\n" + BODY),
}


@pytest.mark.parametrize("behaviour", LAWFUL.values(), ids=LAWFUL)
def test_every_lawful_way_to_answer(server: HostileServer, client: TTAPIClient, behaviour: Behaviour) -> None:
    """However HTTP lets a server send an answer, the image arrives, with one request."""
    server.play(behaviour)
    assert client.generate(CAT).images[0].read_bytes() == png()
    assert len(server.requests) == 1


def test_a_slow_answer_is_read_to_its_end(server: HostileServer, make_client: MakeClient) -> None:
    """`read_timeout` bounds the silence between bytes, not the time that the answer takes."""
    server.play(drip(BODY, size=len(BODY) // 12, pause=0.06))
    assert client_images(make_client(read_timeout=0.5)) == [png()]


def client_images(client: TTAPIClient, request: ImageRequest = CAT) -> list[bytes]:
    return [image.read_bytes() for image in client.generate(request).images]


UNUSABLE = {
    "failed": (answer(200, {"status": "FAILED", "message": "queue timeout", "data": None}), "queue timeout"),
    "error": (answer(200, {"error": {"message": "no luck", "code": "x"}}), "no luck"),
    "no images": (answer(200, {"created": 1, "data": []}), "no images"),
    "null": (answer(200, {"created": 1, "data": None}), "no images"),
    "a list": (answer(200, [1]), "no JSON object"),
    "empty": (answer(200), "after 0 bytes"),
    "nothing at 204": (raw(head(204)), "after 0 bytes"),
    "HTML": (answer(200, b"<html>hello</html>"), "not JSON"),
    "HTML without a length": (raw(head(200) + b"<html>hello</html>"), "not JSON"),
    "no base64": (answer(200, {"data": [{"b64_json": "a*b"}]}), "not base64"),
    "no image": (answer(200, answered(b"<html>no</html>")), "web page"),
    "half an image": (answer(200, answered(png()[:-4])), "cut short"),
    "damaged gzip": (answer(200, b"\x1f\x8bgarbage", {"Content-Encoding": "gzip"}), "damaged"),
    "a strange encoding": (answer(200, BODY, {"Content-Encoding": "br"}), "Content-Encoding"),
}


@pytest.mark.parametrize(("behaviour", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_answer_that_is_of_no_use(
    server: HostileServer, client: TTAPIClient, behaviour: Behaviour, message: str
) -> None:
    """A 2xx without usable images is perhaps paid: an error that says what came, and never another send."""
    server.play(behaviour, answer(200, BODY))
    with pytest.raises(InvalidResponseError, match=message) as caught:
        client.generate(CAT)
    assert caught.value.outcome is Outcome.UNUSABLE
    assert caught.value.status_code in (200, 204)
    assert len(server.requests) == 1


def test_a_body_over_the_limit(server: HostileServer, make_client: MakeClient) -> None:
    """A body, also a small one that inflates, is read up to `max_body_bytes` and no further."""
    bomb = gzip.compress(b'{"data": "' + b"0" * 10_000_000 + b'"}')
    for behaviour in (answer(200, b" " * 100_001), answer(200, bomb, {"Content-Encoding": "gzip"})):
        server.play(behaviour)
        with pytest.raises(InvalidResponseError, match="longer than 100,000 bytes"):
            make_client(max_body_bytes=100_000).generate(CAT)


def test_a_small_body_does_not_fill_the_memory() -> None:
    """Compressed bodies are undone a little at a time, however much is in one piece."""
    pieces = [len(piece) for piece in decoded([gzip.compress(bytes(10_000_000))], "gzip")]
    assert sum(pieces) == 10_000_000
    assert max(pieces) <= 64 * 1024


def test_no_room_for_the_image(
    server: HostileServer, client: TTAPIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a paid answer can't be kept, the error says so, and nothing is sent again."""
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    server.play(answer(200, answered(png(noise=200_000))))
    with pytest.raises(InvalidResponseError, match=r"temporary file: No such file"):
        client.generate(CAT)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": ""}, "api_key"),
        ({"api_key": " \n"}, "api_key"),
        ({"api_key": f"{KEY}\nX-Evil: 1"}, "api_key"),
        ({"api_key": f"{KEY}é"}, "api_key"),
        ({"base_url": "http://api.ttapi.io"}, "https"),
        ({"base_url": f"https://{KEY}@api.ttapi.io"}, "base_url"),
        ({"connect_timeout": 0}, "connect_timeout"),
        ({"read_timeout": float("nan")}, "read_timeout"),
        ({"read_timeout": float("inf")}, "read_timeout"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"total_timeout": -1}, "total_timeout"),
    ],
)
def test_a_client_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    """Wrong arguments are found at once, and no message shows the key."""
    with pytest.raises(ValueError, match=message) as caught:
        TTAPIClient(**{"api_key": KEY, **options})
    assert KEY not in str(caught.value)


def test_a_client_shows_and_pickles_no_key(client: TTAPIClient) -> None:
    """`repr` shows the address; pickling is refused; white space around a key is dropped."""
    assert repr(client) == f"TTAPIClient(base_url={client.base_url!r})"
    with pytest.raises(TypeError, match="make one where it is needed"):
        pickle.dumps(client)
    assert KEY not in str(vars(client))


def test_the_origin_is_the_vendor_not_the_host() -> None:
    """Both of the vendor's hosts are one origin."""
    with TTAPIClient(KEY, "https://api.ttapi.org/") as client:
        assert (client.base_url, client.api_origin) == ("https://api.ttapi.org", "https://api.ttapi.io")


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
    """After 200 failures of all kinds no connection, spool file or other handle is left open."""
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
        server.play(*kinds * 20)
        for _ in range(200):
            with pytest.raises(TTAPIError):
                client.generate(CAT)
        server.play(answer(200, answered(png())))
        client.generate(CAT)
    # a kind that leaks leaves twenty; this process may open one or two for something else meanwhile
    assert open_files() < before + 10
    assert len(server.requests) == 1


def test_read_timeout_is_longer_than_any_model_takes() -> None:
    """Ten minutes, for the client as for the block: giving up costs the image."""
    defaults = inspect.signature(TTAPIClient).parameters["read_timeout"].default
    assert (defaults, TTAPICredentials.model_fields["read_timeout"].default) == (600, 600)
