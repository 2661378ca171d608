"""However an answer is dressed, cut or mislabelled, its images are read, and what can't be read is not lost."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import pickle
import random
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_ttapi.api.answers import Body, read_answer_of
from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.json_stream import DecodingError
from prefect_ttapi.api.outcomes import Break, BrokenOff
from prefect_ttapi.api.payload import UnusableAnswer
from prefect_ttapi.api.transport import Tee
from prefect_ttapi.errors import InvalidResponseError, TTAPIError, UnknownOutcomeError
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import RawAnswer
from tests.support.hostile import (
    Behaviour,
    HostileServer,
    answer,
    answered,
    b64,
    cut,
    head,
    png,
    raw,
    stall,
)
from tests.support.pictures import noisy

MakeClient = Callable[..., TTAPIClient]

CAT = ImageRequest(prompt="a cat")
CATS = ImageRequest(prompt="cats", n=3)
MODEL = ImageRequest(prompt="a cat", model="gpt-image-1")


PNG, JPEG, GIF, BMP, WEBP, AVIF = (
    noisy(form, size=(20, 12)) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "AVIF")
)
KINDS = {"png": PNG, "jpeg": JPEG, "webp": WEBP, "gif": GIF, "bmp": BMP, "avif": AVIF}


def event(document: object, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + f"data: {json.dumps(document)}\n\n".encode()


def safe(image: bytes) -> str:
    return base64.urlsafe_b64encode(image).decode()


def lines(text: str, width: int = 76, end: str = "\n") -> str:
    return end.join(text[at : at + width] for at in range(0, len(text), width)) + end


URI = "data:image/png;base64,"
BARE = {"b64_json": b64(PNG)}
FINISHED = {"type": "image_generation.completed", **BARE}
PREVIEW = {"type": "image_generation.partial_image", "b64_json": b64(png(8, 8)), "partial_image_index": 0}

#: Bodies that have one image, PNG.
DRESSES: dict[str, object] = {
    "as documented": {"created": 1, "data": [BARE]},
    "a data: URI": {"data": [{"b64_json": URI + b64(PNG)}]},
    "a data: URI as a URL": {"data": [{"url": URI + b64(PNG)}]},
    "a data: URI with parameters": {"data": [{"url": f" DATA:image/png; charset=x ; base64 ,{b64(PNG)}"}]},
    "a data: URI, escaped": {"data": [{"url": URI + b64(PNG).replace("+", "%2B").replace("=", "%3d")}]},
    "in lines of 76": {"data": [{"b64_json": lines(b64(PNG))}]},
    "in lines of 64 with CRLF": {"data": [{"b64_json": lines(b64(PNG), 64, "\r\n")}]},
    "with blanks": {"data": [{"b64_json": f" \t{lines(b64(PNG), 5, ' ')} "}]},
    "URL-safe": {"data": [{"b64_json": safe(PNG)}]},
    "without padding": {"data": [{"b64_json": b64(PNG).rstrip("=")}]},
    "URL-safe, in lines, without padding": {"data": [{"b64_json": lines(safe(PNG).rstrip("="), 7)}]},
    "each line padded": {"data": [{"b64_json": "\n".join(b64(PNG[at : at + 50]) for at in range(0, len(PNG), 50))}]},
    "escaped twice": {"data": [{"b64_json": lines(b64(PNG), 76, "\\n").replace("/", "\\/")}]},
    "slashes escaped": json.dumps({"data": [BARE]}).replace("/", "\\/").encode(),
    "all escaped": ('{"data":[{"b64_json":"' + "".join(f"\\u{ord(c):04x}" for c in b64(PNG)) + '"}]}').encode(),
    "line breaks as they are": json.dumps({"data": [{"b64_json": lines(b64(PNG))}]}).replace("\\n", "\n").encode(),
    "data is one object": {"data": BARE},
    "data is a text": {"data": b64(PNG)},
    "data is a list of texts": {"data": [b64(PNG)]},
    "data is a list of data: URIs": {"data": [URI + safe(PNG)]},
    "images": {"images": [BARE]},
    "images as texts": {"images": [b64(PNG)]},
    "output": {"id": 7, "output": [URI + b64(PNG)]},
    "result is a text": {"result": b64(PNG), "status": "completed"},
    "results": {"results": [{"image": b64(PNG)}]},
    "artifacts": {"artifacts": [{"base64": b64(PNG), "finishReason": "SUCCESS"}]},
    "predictions": {"predictions": [{"mimeType": "image/png", "bytesBase64Encoded": b64(PNG)}]},
    "b64": {"data": [{"b64": b64(PNG)}]},
    "image_base64": {"data": [{"image_base64": b64(PNG)}]},
    "imageUrl": {"data": [{"imageUrl": URI + b64(PNG)}]},
    "image_url with a url": {"images": [{"image_url": {"url": URI + b64(PNG)}}]},
    "an unknown key": {"data": [{"picture": b64(PNG)}]},
    "an unknown wrapper": {"job": {"id": 7, "files": [{"name": "x", "contents": b64(PNG)}]}},
    "a thumbnail beside it": {"data": [{"thumbnail": b64(png(4, 4)), **BARE}], "preview": {"b64_json": b64(png(4, 4))}},
    "a bare object": BARE,
    "a bare list": [BARE],
    "a bare text": json.dumps(b64(PNG)).encode(),
    "no JSON but base64": b64(PNG).encode() + b"\n",
    "no JSON but a data: URI": b"data:image/png;base64," + b64(PNG).encode(),
    "data in data": {"data": {"data": [BARE]}},
    "data in data in a list": {"data": [{"data": [BARE]}]},
    "result in the wrapper": {"status": "SUCCESS", "message": "ok", "result": {"data": {"images": [BARE]}}},
    "lists in lists": {"data": [[BARE]]},
    "JSON in JSON": {"code": 0, "data": json.dumps({"data": [BARE]})},
    "URL and bytes": {"data": [{"url": "https://host.invalid/x.png", **BARE}]},
    "an empty list before": {"data": [], "images": [BARE]},
    "an error that is none": {"error": None, "data": [BARE]},
    "an error that says so": {"error": "none", "data": [BARE]},
    "byte-order mark": b"\xef\xbb\xbf" + json.dumps({"data": [BARE]}).encode(),
    "leading blanks": b" \r\n\n\t" * 100 + json.dumps({"data": [BARE]}).encode(),
    "blanks and a byte-order mark": b"\n\n" + json.dumps({"data": [BARE]}).encode() + b"\n\0"[:1],
    "no UTF-8 beside it": b'{"note": "caf\xe9", "data": [{"b64_json": "' + b64(PNG).encode() + b'"}]}',
    "something after it": json.dumps({"data": [BARE]}).encode() + b"\n<!-- cached -->",
    "one line of JSON Lines": json.dumps({"data": [BARE]}).encode() + b"\n",
    "JSON Lines": b"\n".join(json.dumps(x).encode() for x in ({"type": "started"}, PREVIEW, FINISHED)),
    "JSON Lines, the answer last": b'{"status": "ON_QUEUE"}\n' + json.dumps({"data": [BARE]}).encode(),
    "an event stream": event(FINISHED, "image_generation.completed") + b"data: [DONE]\n\n",
    "an event stream with previews": event(PREVIEW) + event(FINISHED),
    "an event stream without a name": event({"data": [BARE]}),
    "an event stream of bare objects": b": hi\n\nid: 1\n" + event(BARE),
    "the image itself": PNG,
}  # fmt: skip


@pytest.mark.parametrize("name", DRESSES)
def test_read_however_it_is_dressed(server: HostileServer, client: TTAPIClient, name: str) -> None:
    """The image of an answer is read whatever JSON, base64 or event it comes in, and the request is sent once."""
    server.play(answer(200, DRESSES[name]))
    assert [image.read_bytes() for image in client.generate(CAT).images] == [PNG]
    assert len(server.requests) == 1


STREAMED = [name for name in DRESSES if name != "an event stream of bare objects"]


@pytest.mark.parametrize("name", STREAMED)
def test_read_where_a_stream_was_asked_for(server: HostileServer, client: TTAPIClient, name: str) -> None:
    """The same where the server was asked to stream, whatever it says that it sends."""
    server.play(answer(200, DRESSES[name], {"Content-Type": "text/event-stream"}))
    assert [e.read_bytes() for e in client.stream(MODEL) if type(e).__name__ == "CompletedImage"] == [PNG]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [b"", b"\0\n", b'AIGC{"Label":"1"}', b"SEFHtrailer" * 1000])
def test_every_kind_of_image_with_what_follows_it(
    server: HostileServer,
    client: TTAPIClient,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    more: bytes,
) -> None:
    """PNG, JPEG, WebP, GIF, BMP and AVIF are kept as they came, trailers and all; the last three with a warning."""
    image = KINDS[kind] + more
    body = image if more else {"data": [{"b64_json": b64(image)}]}
    server.play(answer(200, body, {"Content-Type": f"image/{kind}"}))
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        (came,) = client.generate(CAT).images
    assert (came.media_type, came.width, came.height) == (f"image/{kind}", 20, 12)
    assert came.read_bytes() == image
    assert any("does not promise" in m for m in caplog.messages) is (kind in ("gif", "bmp", "avif"))


URLS = [" {}/x.png\n", "{}/x.png\r\n", "\t{}/x.png", "<{}/x.png>", '"{}/x.png"', "{}/x\n.png"]
PLACES: dict[str, Callable[[str], object]] = {
    "url": lambda url: {"data": [{"url": url}]},
    "b64_json": lambda url: {"data": [{"b64_json": url}]},
    "a text": lambda url: {"data": [url]},
    "data": lambda url: {"data": url},
    "image_url": lambda url: {"images": [{"image_url": {"url": url}}]},
    "output": lambda url: {"output": url},
    "beside another's error": lambda url: {"data": [{"url": url}], "error": {"code": "moderation_blocked"}},
    "beside no error": lambda url: {"error": "None", "data": [{"url": url}]},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_url_wherever_it_stands_and_whatever_is_around_it(
    server: HostileServer, client: TTAPIClient, place: str
) -> None:
    """Blanks, line breaks and brackets around a URL cost no image, nor does the place where it stands."""
    for url in URLS:
        server.play(answer(200, PLACES[place](url.format(server.url))), answer(200, PNG))
        assert client.generate(CAT).images[0].read_bytes() == PNG
        assert [request.path for request in server.requests[1:]] == ["/x.png"]


def test_facts_around_the_images(server: HostileServer, client: TTAPIClient) -> None:
    """Tokens, time and revised prompt are found wherever the wrapping puts them."""
    inner = {"images": [{"b64": b64(PNG)}], "usage": {"total_tokens": 9}, "revised_prompt": "so"}
    server.play(answer(200, {"code": 0, "created": 5, "result": inner}))
    came = client.generate(CAT)
    assert (came.created, came.usage and came.usage.total_tokens, came.images[0].revised_prompt) == (
        5,
        9,
        "so",
    )


# cut answers

THREE = json.dumps(
    {
        "created": 3,
        "data": [{"b64_json": b64(png(size, 1))} for size in (1, 2, 3)],
        "usage": {"total_tokens": 5},
    }
).encode()
CHUNKED = {"Transfer-Encoding": "chunked"}
THIRD = b64(png(3, 1)).encode()
BEGUN = THREE[: THREE.index(THIRD) + 9]
EVENTS = b"".join(event({"data": [{"b64_json": b64(png(size, 1))}]}) for size in (1, 2))
LINES = b"".join(b'{"b64_json": "%s"}\n' % b64(png(size, 1)).encode() for size in (1, 2, 3))
CUT: dict[str, Behaviour] = {
    "the connection is lost": cut(THREE, len(BEGUN)),
    "it is reset": cut(THREE, len(BEGUN), reset=True),
    "the JSON ends early": answer(200, BEGUN),
    "the compressed body ends early": answer(200, gzip.compress(BEGUN)[:-9], {"Content-Encoding": "gzip"}),
    "the server falls silent": stall(head(200, CHUNKED) + b"ffff\r\n" + BEGUN),
    "not base64": answer(200, THREE.replace(THIRD, b"****")),
    "NaN": answer(200, THREE.replace(THIRD, b'", "x": NaN, "y": "')),
    "the event stream is cut": cut(EVENTS + b"data: {......", len(EVENTS) + 7),
    "JSON Lines are cut": answer(200, LINES[:-25]),
}


@pytest.mark.parametrize("name", CUT)
def test_a_cut_answer_keeps_its_whole_images(
    server: HostileServer, make_client: MakeClient, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """What came whole before an answer broke off is given, with a warning, and nothing is sent again."""
    server.play(CUT[name])
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        came = make_client(read_timeout=0.3, retry_unknown_outcome=True).generate(CATS)
    assert [image.read_bytes() for image in came.images] == [png(1, 1), png(2, 1)]
    assert [(image.index, image.width) for image in came.images] == [(0, 1), (1, 2)]
    assert any("3 images were asked for, 2 came" in message for message in caplog.messages)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "behaviour",
    [
        cut(THREE, len(THREE) - 1),
        raw(head(200, {"Content-Length": str(len(THREE) + 1)}) + THREE),
        raw(head(200, CHUNKED) + b"ffff\r\n" + THREE),
        raw(head(200, CHUNKED) + b"%x\r\n%s\r\n" % (len(THREE), THREE)),
        raw(head(200, {"Content-Encoding": "gzip"}) + gzip.compress(THREE)[:-9]),
        stall(head(200, {"Content-Length": str(len(THREE) + 1)}) + THREE[:-1]),
        answer(200, THREE + b"x"),
    ],
    ids=[
        "one byte early",
        "a length that lies",
        "in a chunk",
        "between chunks",
        "half a gzip",
        "silent",
        "more",
    ],
)
def test_what_breaks_after_the_images_does_no_harm(
    server: HostileServer, make_client: MakeClient, caplog: pytest.LogCaptureFixture, behaviour: Behaviour
) -> None:
    """All images came: they are given, and the log says what broke."""
    server.play(behaviour)
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        assert len(make_client(read_timeout=0.2).generate(CATS).images) == 3
    assert len(caplog.messages) == 1


def in_pieces(body: bytes, cuts: list[int], broke: bool) -> Iterator[bytes]:
    places = [0, *sorted(cuts), len(body)]
    yield from (body[start:end] for start, end in pairwise(places))
    if broke:
        raise BrokenOff(Break.CUT)


def images_of(body: bytes, cuts: list[int] | None = None, *, broke: bool = False) -> list[bytes] | None:
    """The images of a body that comes in these pieces; None where it has none."""
    try:
        read = read_answer_of(Body(in_pieces(body, cuts or [], broke)), 10, 10**7)
    except (BrokenOff, DecodingError, UnusableAnswer):
        return None
    return [item.image[0].read_bytes() for item in read.items if item.image]


FIRST, SECOND = png(1, 1), png(2, 1)
BOTH = [FIRST, SECOND]
BODIES = {
    "dressed": json.dumps(
        {"data": [{"b64_json": b64(FIRST)}, {"b64_json": f" {URI}\n{lines(safe(SECOND))}"}], "created": 1}
    ),
    "escaped": json.dumps(
        {"images": [b64(FIRST), {"url": URI + b64(SECOND).replace("/", "%2F")}], "usage": {}}
    ).replace("/", "\\/"),
    "events": (
        event(PREVIEW)
        + event({"data": [{"b64_json": b64(FIRST)}]})
        + event({**FINISHED, "b64_json": b64(SECOND)})
    ).decode(),
    "lines": "\n".join(json.dumps({"b64_json": b64(image)}) for image in BOTH),
}


@pytest.mark.parametrize("name", BODIES)
def test_every_chunk_boundary(name: str) -> None:
    """Two pieces cut at any byte, and a piece for each byte, give the same images."""
    body = BODIES[name].encode()
    assert images_of(body, list(range(len(body)))) == BOTH
    for place in range(len(body)):
        assert images_of(body, [place]) == BOTH


@pytest.mark.parametrize("name", BODIES)
def test_cut_at_every_byte(name: str) -> None:
    """Wherever a body is cut, what came whole is given, never less than before, and never half an image."""
    body, came = BODIES[name].encode(), list[bytes]()
    for end in range(len(body)):
        found = images_of(body[:end], [end // 2], broke=True)
        assert found == images_of(body[:end])
        assert (found or [])[: len(came)] == came
        came = found or []
        assert came == BOTH[: len(came)]
    assert came == BOTH


# any dress

IMAGES = st.sampled_from([PNG, JPEG, GIF, BMP, WEBP, AVIF, PNG + b"trailer", png(300, 2)])


@st.composite
def texts(draw: st.DrawFn, image: bytes) -> str:
    """Base64 of an image in some dress."""
    text = draw(st.sampled_from([b64, safe]))(image)
    text = text.rstrip("=") if draw(st.booleans()) else text
    if draw(st.booleans()):
        text = lines(text, draw(st.integers(1, 100)), draw(st.sampled_from(["\n", "\r\n", " ", "\t"])))
    before = draw(st.sampled_from(["", " ", "\n"]))
    kind = draw(st.sampled_from(["", "data:image/png;base64,", "data:;base64,", "data:image/x;a=b;base64, "]))
    return before + kind + text


@st.composite
def dressed(draw: st.DrawFn, image: bytes) -> tuple[bytes, list[int]]:
    """A body with one image, and where it is cut into pieces."""
    key = draw(st.sampled_from(["b64_json", "b64", "image_base64", "base64", "B64-JSON"]))
    value: Any = {key: draw(texts(image)), "revised_prompt": "x"}
    for _ in range(draw(st.integers(0, 4))):
        around = draw(st.sampled_from(["data", "images", "output", "result", "list", "results", "response"]))
        beside = draw(
            st.sampled_from([{}, {"usage": {"total_tokens": 1}}, {"error": None}, {"status": "ok"}])
        )
        value = [value] if around == "list" else {**beside, around: value}
    indent = draw(st.sampled_from([None, 1]))
    body = json.dumps(value, indent=indent, ensure_ascii=draw(st.booleans()))
    body = body.replace("/", "\\/") if draw(st.booleans()) else body
    body = body.replace("\n", "\ndata: ") if indent is not None else body
    framed = f"event: x.completed\ndata: {body}\n\n" if indent is not None or draw(st.booleans()) else body
    whole = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + framed.encode()
    return whole, draw(st.lists(st.integers(0, len(whole)), max_size=4))


@settings(max_examples=150)
@given(st.data())
def test_any_dress_gives_the_same_bytes(data: st.DataObject) -> None:
    """Whatever wraps an image, and however it is written, its very bytes come out."""
    image = data.draw(IMAGES)
    body, cuts = data.draw(dressed(image))
    assert images_of(body, cuts) == [image]


@settings(max_examples=100)
@given(st.data())
def test_any_dress_gives_the_same_bytes_or_an_error_that_kept_them(data: st.DataObject) -> None:
    """Wrapped in anything under any name, an image comes out as it is, or all that came is kept."""
    image = data.draw(IMAGES)
    value: Any = data.draw(
        st.sampled_from([{"b64_json": b64(image)}, b64(image), {"file": b64(image)}, [b64(image)]])
    )
    for _ in range(data.draw(st.integers(0, 4))):
        beside = data.draw(
            st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=9))
        )
        value = data.draw(st.sampled_from([[value], {**beside, data.draw(st.text(max_size=8)): value}]))
    body, tee = json.dumps(value).encode(), Tee()
    size = data.draw(st.integers(1, len(body)))
    chunks = tee.through(iter([body[at : at + size] for at in range(0, len(body), size)]))
    try:
        (item,) = read_answer_of(Body(chunks, "", tee.reading), 1, 10**7).items
    except (DecodingError, UnusableAnswer):
        kept = tee.body()
        assert kept is not None
        assert kept.read_bytes() == body
    else:
        assert item.image is not None
        assert item.image[0].read_bytes() == image


@pytest.mark.parametrize("key", ["preview", "thumbnail", "partial_image", "input_image", "mask"])
def test_another_picture_is_not_taken_for_the_image(key: str) -> None:
    """A preview, or what was sent, must not pass for the image that is paid for."""
    assert images_of(json.dumps({"status": "queued", key: b64(PNG)}).encode()) is None
    assert images_of(json.dumps({"status": "queued", key: {"b64_json": b64(PNG)}}).encode()) is None


# what can't be read is kept

UNREADABLE: dict[str, tuple[Behaviour, bytes]] = {
    "a page": (answer(200, b"<html>hello</html>", {"Content-Type": "text/html"}), b"<html>hello</html>"),
    "an unknown shape": (answer(200, {"blob": [1, 2]}), b'{"blob": [1, 2]}'),
    "no base64": (answer(200, {"data": [{"b64_json": "a*b"}]}), b'{"data": [{"b64_json": "a*b"}]}'),
    "another kind of image": (answer(200, b"\0\0\0\x1cftypheic" + bytes(50)), b"\0\0\0\x1cftypheic" + bytes(50)),
    "half an image": (answer(200, answered(png()[:-4])), json.dumps(answered(png()[:-4])).encode()),
    "too deep, and much more": (answer(200, b"[" * 100 + b"x" * 300_000), b"[" * 100 + b"x" * 300_000),
    "an unknown event": (answer(200, event({"type": "x.queued", "id": 7})), event({"type": "x.queued", "id": 7})),
    "compressed": (
        answer(200, gzip.compress(b"<html>"), {"Content-Encoding": "gzip"}),
        b"<html>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_nobody_can_read_is_kept_whole(server: HostileServer, client: TTAPIClient, name: str) -> None:
    """The error has the whole body as it came, which can be read again, and is not sent for."""
    behaviour, body = UNREADABLE[name]
    server.play(behaviour)
    with pytest.raises(InvalidResponseError) as caught:
        client.generate(CAT)
    kept = caught.value.answer
    assert kept is not None
    assert kept.body.read_bytes() == body
    with pytest.raises(InvalidResponseError) as again:
        client.read_again(CAT, kept)
    assert (again.value.answer, again.value.message) == (kept, caught.value.message)
    assert len(server.requests) == 1
    assert pickle.loads(pickle.dumps(caught.value)).answer is None


def noise(size: int) -> str:
    return b64(random.Random(size).randbytes(size))  # noqa: S311 - no secret


LARGE: dict[str, bytes] = {
    "plain": json.dumps({"data": [{"b64_json": noise(size)} for size in (400_000, 1, 262_144, 300_001)]}).encode(),
    "in lines": json.dumps({"data": [{"b64_json": lines(noise(400_000))}, {"b64_json": noise(300_000)}]}).encode(),
    "dressed late": json.dumps({"data": [{"b64_json": noise(400_000) + "\n" + noise(300_001)}]}).encode(),
    "no base64 late": json.dumps({"data": [{"b64_json": noise(600_000) + "*" + noise(300_001)}]}).encode(),
    "a data: URI": json.dumps({"data": [{"url": URI + noise(600_000)}]}).encode(),
    "events": event({"type": "x.completed", "b64_json": noise(500_000)}) + event({"b64_json": noise(300_000)}) + b"x",
    "no JSON": b"<html>" + noise(400_000).encode(),
    "cut": json.dumps({"data": [{"b64_json": noise(900_000)}]}).encode()[:-200_001],
}  # fmt: skip


@pytest.mark.parametrize("size", [1 << 12, 65_536, 100_003, 1 << 21])
@pytest.mark.parametrize("name", LARGE)
def test_a_large_answer_is_kept_byte_for_byte(name: str, size: int) -> None:
    """What is in the files of images is not written twice, and yet the body comes out as it came."""
    body, tee = LARGE[name], Tee()
    chunks = tee.through(iter([body[at : at + size] for at in range(0, len(body), size)]))
    with pytest.raises((DecodingError, UnusableAnswer)):
        read_answer_of(Body(chunks, "", tee.reading), 9, 10**7)
    for _ in chunks:
        pass
    kept = tee.body()
    assert kept is not None
    assert kept.read_bytes() == body


MANY: dict[str, bytes] = {
    **{
        name: json.dumps({"images": [{"b64_json": dress(noise(3_000_000))}] * 3}).encode()
        for name, dress in {"plain": str, "in lines": lines, "a data: URI": (URI + "{}").format}.items()
    },
    # its line ends with a chunk
    "after an event that breaks off": b'data:    {"b64_json": "%s\n'
    % noise(300_000)[: 4 * 65_536 - 24].encode()
    + b"\n"
    + event({"b64_json": noise(3_000_000)}) * 3,
}


@pytest.mark.parametrize("name", MANY)
def test_memory_is_bounded_in_any_dress(name: str) -> None:
    """Reading and keeping 12 MB of images takes some 2 MB, whatever they are dressed in."""
    body, tee = MANY[name], Tee()
    tracemalloc.start()
    chunks = tee.through(bytes(body[at : at + 65_536]) for at in range(0, len(body), 65_536))
    with pytest.raises(UnusableAnswer):
        read_answer_of(Body(chunks, "", tee.reading), 9, 10**9)
    kept = tee.body()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept is not None
    assert kept.read_bytes() == body
    assert peak < 3_000_000


@pytest.mark.parametrize(
    "document",
    [
        {"blob": {"parts": [1, 2]}, "message": "done, 5 requests per minute left"},
        {"blob": "AAAA" * 99, "message": "done, 5 requests per minute left"},
        {"blob": "AAAA", "note": "rate limit: 5 requests per minute"},
    ],
)
def test_words_beside_what_may_be_images_are_no_refusal(
    server: HostileServer, client: TTAPIClient, document: object
) -> None:
    """An answer that nobody can read is paid, whatever words stand in it: it is kept, and not sent again."""
    server.play(answer(200, document))
    with pytest.raises(InvalidResponseError) as caught:
        client.generate(CAT)
    assert caught.value.answer is not None
    assert len(server.requests) == 1


def test_an_answer_cut_before_its_first_image_is_kept(server: HostileServer, client: TTAPIClient) -> None:
    """Nobody knows what became of it: the outcome is unknown, and what came is in hand."""
    body = json.dumps(answered(png(noise=500))).encode()[:300]
    for behaviour in (cut(body + b"x", 300), answer(200, body), raw(head(200) + body)):
        server.play(behaviour)
        with pytest.raises(UnknownOutcomeError) as caught:
            client.generate(CAT)
        assert caught.value.answer is not None
        assert caught.value.answer.body.read_bytes() == body
        with pytest.raises(UnknownOutcomeError):
            client.read_again(CAT, caught.value.answer)


def test_an_address_that_was_cut_is_none(server: HostileServer, client: TTAPIClient) -> None:
    """What is left of a URL without JSON around it leads elsewhere: nobody knows the outcome, nothing is fetched."""
    server.play(cut(f"{server.url}/x.png?signature=0123".encode(), len(server.url) + 9))
    with pytest.raises(UnknownOutcomeError) as caught:
        client.generate(CAT, patience=0)
    assert caught.value.answer is not None
    assert len(server.requests) == 1


def test_an_answer_to_an_earlier_send_is_kept(server: HostileServer, make_client: MakeClient) -> None:
    """Where who opted in sends again, and that fails, what came of the first send is still in hand."""
    body = json.dumps(answered(png(noise=500))).encode()
    server.play(cut(body, 300), answer(400, {"message": "no"}))
    with pytest.raises(TTAPIError, match="no") as caught:
        make_client(retry_unknown_outcome=True).generate(CAT)
    assert caught.value.answer is not None
    assert caught.value.answer.body.read_bytes() == body[:300]


@pytest.mark.parametrize(
    "behaviour",
    [
        answer(200),
        raw(head(204)),
        answer(400, {"message": "no"}),
        answer(200, {"status": "FAILED", "message": "Insufficient balance, please recharge", "data": None}),
        answer(200, {"code": 400, "message": "Insufficient balance", "data": []}),
        answer(200, {"data": [{"error": {"code": "content_policy_violation", "message": "no"}}]}),
        answer(200, event({"type": "error", "error": {"code": "moderation_blocked", "message": "no"}})),
    ],
)
def test_where_nothing_is_in_hand_nothing_is_kept(
    server: HostileServer, client: TTAPIClient, behaviour: Behaviour
) -> None:
    """An empty answer, one with an error's status, and a refusal under 200, have nothing to keep."""
    server.play(behaviour)
    with pytest.raises(TTAPIError) as caught:
        client.generate(CAT)
    assert caught.value.answer is None


def test_a_newer_version_reads_what_an_older_could_not(client: TTAPIClient) -> None:
    """An answer that was kept is read by the same path as one that comes."""

    body = Spool(hashing=False)
    body.write(event(PREVIEW) + event({**FINISHED, "usage": {"total_tokens": 3}}))
    came = client.read_again(CAT, RawAnswer(body, "application/json", "r-1"))
    assert [image.read_bytes() for image in came.images] == [PNG]
    assert (came.request_id, came.usage and came.usage.total_tokens) == ("r-1", 3)
