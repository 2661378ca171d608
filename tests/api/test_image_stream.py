"""TTAPIClient.stream against a server that streams well, badly, or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable

import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.errors import (
    DownloadError,
    InvalidResponseError,
    Outcome,
    ServerError,
    TTAPIError,
    UnknownOutcomeError,
)
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import CompletedImage, PartialImage, Usage
from tests.support.hostile import (
    Behaviour,
    HostileServer,
    Wire,
    answer,
    answered,
    b64,
    head,
    png,
    raw,
    stall,
)

MakeClient = Callable[..., TTAPIClient]

CAT = ImageRequest(prompt="a cat", model="gpt-image-1", stream=True, partial_images=2)
USAGE = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}


def event(document: object, name: str = "", end: str = "\n") -> bytes:
    text = document if isinstance(document, str) else json.dumps(document)
    return (f"event: {name}{end}" if name else "").encode() + f"data: {text}{end}{end}".encode()


def partial(index: int | None = 0, image: bytes = png(8, 8)) -> bytes:
    index_field = {} if index is None else {"partial_image_index": index}
    return event({"type": "image_generation.partial_image", "b64_json": b64(image), **index_field})


def completed(image: bytes = png(), **more: object) -> bytes:
    return event({"type": "image_generation.completed", "b64_json": b64(image), "usage": USAGE, **more})


def streaming(*events: bytes, size: int | None = None) -> Behaviour:
    """A stream that ends as it should."""
    body = b"".join(events)
    pieces = [body[i : i + size] for i in range(0, len(body), size)] if size else [body]
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    return raw(
        head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}),
        *chunks,
        b"0\r\n\r\n",
    )


def seen(events: Iterable[PartialImage | CompletedImage]) -> list[tuple[str, int, bytes]]:
    return [(type(event).__name__, event.index, event.read_bytes()) for event in events]


def test_previews_and_the_finished_image(server: HostileServer, client: TTAPIClient) -> None:
    """Previews come first, then the image with its tokens; the request asks for a stream."""
    large = png(64, 64, noise=500_000)
    server.play(
        streaming(partial(0), partial(1, png(9, 9)), completed(large, revised_prompt="so"), size=5000)
    )
    events = list(client.stream(CAT))
    assert seen(events) == [
        ("PartialImage", 0, png(8, 8)),
        ("PartialImage", 1, png(9, 9)),
        ("CompletedImage", 0, large),
    ]
    finished = events[-1]
    assert (finished.usage.total_tokens, finished.width, finished.media_type) == (3, 64, "image/png")
    assert finished.open().read() == large
    (request,) = server.requests
    assert request.json == {"model": "gpt-image-1", "prompt": "a cat", "stream": True, "partial_images": 2}
    assert request.headers["accept"] == "text/event-stream"


def test_a_request_without_stream_is_streamed(server: HostileServer, client: TTAPIClient) -> None:
    """`stream` asks for a stream whatever the request says."""
    server.play(streaming(completed()))
    list(client.stream(ImageRequest(prompt="a cat", model="gpt-image-2")))
    assert server.requests[0].json["stream"] is True


IMAGE = {"b64_json": b64(png())}
FINISHED = {
    "as the vendor does": [completed()],
    "done": [completed(), b"data: [DONE]\n\n"],
    "CRLF": [event({**IMAGE, "type": "image_generation.completed"}, end="\r\n")],
    "CR": [event({**IMAGE, "type": "image_generation.completed"}, end="\r")],
    "byte-order mark": [b"\xef\xbb\xbf" + completed()],
    "comments": [b": ping\n\n", completed()],
    "after a preview that breaks off": [
        b'data: {"type": "x.partial_image", "b64_json": "%s\n\n' % b64(png())[:60].encode(),
        completed(),
    ],
    "several lines of data": [
        b'data: {"type": "x.completed",\ndata:  "b64_json":\ndata: "%s"}\n\n' % b64(png()).encode()
    ],
    "unknown events": [event({"type": "ping"}), event("hello", "x"), event("[1]"), event("{"), completed()],
    "an unfinished thing": [event({"type": "response.completed"}), completed()],
    "name instead of type": [event({**IMAGE, "usage": USAGE}, "image_generation.completed")],
    "neither name nor type": [event({**IMAGE, "usage": USAGE})],
    "no usage": [event({**IMAGE, "type": "image_generation.completed"})],
    "another prefix": [event({**IMAGE, "type": "image_edit.completed"})],
    "no empty line at the end": [completed().rstrip()],
    "cut behind the image": [completed()[:-9]],
    "null fields": [completed(created_at=None, size=None, error=None, background=None)],
    "odd fields": [completed(created_at="x", size={"a": [1]}, partial_image_index="y", usage="many")],
    "escapes": [event({**IMAGE, "type": "x.completed"}).replace(b"/", b"\\/")],
    "bad previews": [partial(image=b"no image"), event({"type": "x.partial_image", "b64_json": "*"}), completed()],
    "a preview's URL": [event({"type": "x.partial_image", "url": "http://127.0.0.1:1/x"}), completed()],
}  # fmt: skip


@pytest.mark.parametrize("events", FINISHED.values(), ids=FINISHED)
@pytest.mark.parametrize("size", [1, None], ids=["byte by byte", "at once"])
def test_every_form_of_a_finished_image(
    server: HostileServer, client: TTAPIClient, events: list[bytes], size: int | None
) -> None:
    """Names, types and fields may be missing, and everything may come split: the image is found."""
    server.play(streaming(*events, size=size))
    assert seen(client.stream(CAT)) == [("CompletedImage", 0, png())]


def test_previews_are_counted_where_they_have_no_index(server: HostileServer, client: TTAPIClient) -> None:
    """Without type, name and tokens an image is a preview: a preview must not pass for the paid image."""
    server.play(streaming(partial(None), event({"b64_json": b64(png())}), completed()))
    assert [(type(e).__name__, e.index) for e in client.stream(CAT)] == [
        ("PartialImage", 0),
        ("PartialImage", 1),
        ("CompletedImage", 0),
    ]


UNFINISHED = {
    "nothing": ([], "ended before"),
    "previews only": ([partial()], "ended before"),
    "done too early": ([b"data: [DONE]\n\n", completed()], "ended before"),
    "cut in an event": ([completed()[:60]], "item 0 of the answer: "),
    "no images in it": ([event({"type": "image_generation.completed", "usage": USAGE})], "ended before"),
    "error": ([partial(), event({"error": {"message": "gone wrong", "code": 1}}), completed()], "gone wrong"),
    "error event": ([event({"type": "error", "message": "gone wrong"})], "gone wrong"),
    "named error": ([event({"message": "gone wrong"}, "error")], "gone wrong"),
    "wordless error": ([event("oh no", "error")], "reports an error"),
    "vendor's error": ([event({"status": "FAILED", "message": "gone wrong", "data": None})], "gone wrong"),
    "no image": ([completed(b"<html>")], "web page"),
    "half an image": ([completed(png()[:-1])], "cut short"),
    "no stream": ([b"<html>hello</html>"], "ended before"),
}


@pytest.mark.parametrize(("events", "message"), UNFINISHED.values(), ids=UNFINISHED)
def test_a_stream_without_a_finished_image_raises(
    server: HostileServer, make_client: MakeClient, events: list[bytes], message: str
) -> None:
    """An early end or an error is never an empty success, and is never sent again, opted in or not."""
    server.play(streaming(*events), streaming(completed()))
    with pytest.raises(InvalidResponseError, match=message) as caught:
        list(make_client(retry_unknown_outcome=True).stream(CAT))
    assert (caught.value.outcome, len(server.requests)) == (Outcome.UNUSABLE, 1)


HEAD = head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
BROKEN = {
    "closed": raw(HEAD + b"5\r\n: abc"),
    "reset": raw(HEAD + b"5\r\n: abc", reset=True),
    "silent": stall(HEAD + b"5\r\n: abc"),
    "damaged": raw(HEAD + b"zzz\r\n: abc"),
}


@pytest.mark.parametrize("behaviour", BROKEN.values(), ids=BROKEN)
def test_a_stream_that_breaks_is_unknown_and_not_sent_again(
    server: HostileServer, make_client: MakeClient, behaviour: Behaviour
) -> None:
    """Once a stream began to answer, nothing makes the request be sent again."""
    server.play(behaviour, streaming(completed()))
    with pytest.raises(UnknownOutcomeError):
        list(make_client(read_timeout=0.2, retry_unknown_outcome=True).stream(CAT))
    assert len(server.requests) == 1


@pytest.mark.parametrize("end_of_event", [b"\n\n", b"\n", b""])
@pytest.mark.parametrize("ending", [b"", b"5\r\n\n: ", b"zz\r\n"])
@pytest.mark.parametrize("n", [1, 2])
def test_what_breaks_after_the_image_does_no_harm(
    server: HostileServer,
    client: TTAPIClient,
    caplog: pytest.LogCaptureFixture,
    end_of_event: bytes,
    ending: bytes,
    n: int,
) -> None:
    """A connection that drops after a finished image is a success, with a warning where more was asked for."""
    image = completed().rstrip() + end_of_event
    chunk = b"%x\r\n%s\r\n" % (len(image), image)
    server.play(raw(HEAD + chunk + ending, reset=True))
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        request = ImageRequest(prompt="a cat", model="gpt-image-1", n=n)
        assert seen(client.stream(request)) == [("CompletedImage", 0, png())]
    assert any("2 images were asked for, 1 came" in message for message in caplog.messages) is (n == 2)


def test_failures_before_the_stream_are_outlasted(server: HostileServer, client: TTAPIClient) -> None:
    """Until an answer begins, a stream is sent again like any other request."""
    server.play(answer(503), answer(429), streaming(completed()))
    assert len(list(client.stream(CAT))) == 1
    assert len(server.requests) == 3
    server.play(answer(500, {"error": {"message": "broken"}}))
    with pytest.raises(ServerError, match="broken") as caught:
        list(client.stream(CAT))
    assert caught.value.attempts == 3


def test_an_error_in_the_stream_tells_of_the_attempts_before(
    server: HostileServer, client: TTAPIClient
) -> None:
    """The error of a stream carries attempts, id and time, like that of any other request."""
    server.play(answer(429), raw(HEAD.replace(b"\r\n\r\n", b"\r\nX-Request-Id: r-9\r\n\r\n") + b"0\r\n\r\n"))
    with pytest.raises(TTAPIError) as caught:
        list(client.stream(CAT))
    assert (caught.value.attempts, caught.value.request_id, caught.value.elapsed) == (2, "r-9", 1.0)


def test_several_images(server: HostileServer, client: TTAPIClient) -> None:
    """Finished images are numbered as they come; what follows the last one does not matter."""
    server.play(streaming(completed(png(1, 1)), completed(png(2, 2)), event({"error": "late"}), completed()))
    request = ImageRequest(prompt="cats", model="gpt-image-1", n=2)
    assert seen(client.stream(request)) == [
        ("CompletedImage", 0, png(1, 1)),
        ("CompletedImage", 1, png(2, 2)),
    ]


@pytest.mark.parametrize("media_type", ["text/event-stream", "text/plain", ""])
def test_an_answer_at_once_by_another_name(
    server: HostileServer, client: TTAPIClient, media_type: str
) -> None:
    """JSON where a stream was asked for is known by its first byte: its image is paid, its error has words."""
    server.play(answer(200, answered(png()), {"Content-Type": media_type}))
    assert seen(client.stream(CAT)) == [("CompletedImage", 0, png())]
    server.play(answer(200, {"status": "FAILED", "message": "busy"}, {"Content-Type": media_type}))
    with pytest.raises(InvalidResponseError, match="busy"):
        list(client.stream(CAT))


def test_a_server_that_does_not_stream(server: HostileServer, client: TTAPIClient) -> None:
    """An answer all at once, although a stream was asked for, is paid: its images are given, its error raised."""
    json_type = {"Content-Type": "application/json; charset=utf-8"}
    server.play(answer(200, answered(png(1, 1), png(2, 2), usage=USAGE), json_type))
    events = list(client.stream(CAT))
    assert seen(events) == [("CompletedImage", 0, png(1, 1)), ("CompletedImage", 1, png(2, 2))]
    assert [event.usage and event.usage.total_tokens for event in events] == [3, None]
    server.play(answer(200, {"status": "FAILED", "message": "busy"}, json_type))
    with pytest.raises(InvalidResponseError, match="busy"):
        list(client.stream(CAT))


def test_no_room_for_the_image(
    server: HostileServer, client: TTAPIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is told of, and the request, which may be paid, is not sent again."""
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    server.play(streaming(completed(png(noise=200_000))))
    with pytest.raises(InvalidResponseError, match="temporary file: No such file"):
        list(client.stream(CAT))
    assert len(server.requests) == 1


def test_an_image_by_url(server: HostileServer, client: TTAPIClient) -> None:
    """A finished event with a URL instead of bytes is fetched."""
    image = event({"type": "image_generation.completed", "url": f"{server.url}/x.png"})
    server.play(streaming(image), answer(200, png()))
    assert seen(client.stream(CAT)) == [("CompletedImage", 0, png())]


@pytest.mark.parametrize("with_bytes", [False, True], ids=["a URL", "bytes"])
def test_tokens_are_told_whichever_image_is_had(
    server: HostileServer, make_client: MakeClient, with_bytes: bool
) -> None:
    """Where the first image of an answer can't be fetched, its tokens come with the next one."""
    lost, had = {"url": f"{server.url}/lost.png"}, {"url": f"{server.url}/x.png"}
    data = [lost, {"b64_json": b64(png())} if with_bytes else had]
    fetched = [answer(404)] if with_bytes else [answer(404), answer(200, png())]
    server.play(answer(200, {"data": data, "usage": USAGE}), *fetched)
    events: list[PartialImage | CompletedImage] = []
    with pytest.raises(DownloadError):
        events.extend(make_client().stream(CAT, patience=0))
    assert [isinstance(event, CompletedImage) and event.usage for event in events] == [Usage(**USAGE)]


def test_closing_early_closes_the_connection(server: HostileServer, client: TTAPIClient) -> None:
    """Who stops listening hangs up; nothing is sent before somebody listens."""
    hung_up = threading.Event()

    def behave(wire: Wire) -> bool:
        wire.send(HEAD + b"%x\r\n%s\r\n" % (len(partial()), partial()))
        with contextlib.suppress(ConnectionResetError):
            assert wire.sock.recv(1) == b""
        hung_up.set()
        return False

    server.play(behave)
    stream = client.stream(CAT)
    assert server.requests == []
    assert isinstance(next(stream), PartialImage)
    assert not hung_up.is_set()
    stream.close()
    assert hung_up.wait(10)
    with pytest.raises(StopIteration):
        next(stream)
