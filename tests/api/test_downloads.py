"""Fetching image URLs: from whom, what is sent along, and how long it is tried."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import ssl
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.downloads import ANYWHERE, Downloader
from prefect_ttapi.errors import DownloadError, Outcome
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.stopping import Stop
from tests.support.clocks import StoppedClock
from tests.support.downloading import IMAGE, WAITS, fetch, redirect, refused
from tests.support.hostile import (
    KEY,
    Behaviour,
    HostileServer,
    Wire,
    answer,
    close,
    cut,
    drip,
    head,
    png,
    raw,
    reset,
    stall,
)

CAT = ImageRequest(prompt="a cat", model="dall-e-3")
SECRET = "X-Signature=s3cr3t"
FIRST = 1 + len(WAITS)


@pytest.fixture
def downloader(stopped: StoppedClock) -> Iterator[Downloader]:
    stopped.sleeps.clear()
    made = Downloader(reach=ANYWHERE, read_timeout=0.3, clock=stopped, max_bytes=1_000_000)
    yield made
    made.close()


def test_nothing_of_ours_is_sent_along(
    server: HostileServer, client: TTAPIClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key, no cookies, no proxy, no referrer: a download is a bare GET, also after a redirect."""
    monkeypatch.setenv("HTTP_PROXY", "http://user:password@127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://user:password@127.0.0.1:9")
    body = {"data": [{"url": f"{server.url}/a.png?{SECRET}"}, {"url": f"{server.url}/b.png"}]}
    server.play(
        answer(200, body, {"Set-Cookie": "api=1"}), redirect("/c.png"), answer(200, IMAGE), answer(200, IMAGE)
    )
    result = client.generate(CAT)
    assert [image.read_bytes() for image in result.images] == [IMAGE, IMAGE]
    assert [(r.method, r.path) for r in server.requests[1:]] == [
        ("GET", f"/a.png?{SECRET}"),
        ("GET", "/c.png"),
        ("GET", "/b.png"),
    ]
    for request in server.requests[1:]:
        assert request.headers.keys() == {"host", "accept", "accept-encoding", "connection", "user-agent"}
        assert request.headers["host"] == f"127.0.0.1:{server.port}"
        assert KEY not in str(request)


FLAKY: dict[str, list[Behaviour]] = {
    "not there yet": [answer(404), answer(404), answer(403)],
    "faults": [answer(500), answer(503), answer(429), answer(502), answer(504)],
    "refused": [close(), reset(), raw(b"nonsense\r\n\r\n")],
    "silent": [stall(), stall(head(200, {"Content-Length": "10"}))],
    "cut": [cut(IMAGE, 1000), cut(IMAGE, 100_000, reset=True)],
    "cut without a length": [raw(head(200) + IMAGE[:100])],
    "a page first": [answer(200, b"<html>please wait</html>", {"Content-Type": "image/png"})],
    "damaged gzip": [answer(200, b"xx", {"Content-Encoding": "gzip"})],
    "a part nobody asked for": [answer(206, IMAGE, {"Content-Range": f"bytes 0-9/{len(IMAGE)}"})],
}


@pytest.mark.parametrize("failures", FLAKY.values(), ids=FLAKY)
def test_what_fails_for_a_while_is_tried_again(
    server: HostileServer, downloader: Downloader, stopped: StoppedClock, failures: list[Behaviour]
) -> None:
    """CDNs lag, connections break: an image that comes in the end is the whole image."""
    server.play(*failures, answer(200, IMAGE))
    spool, facts = fetch(downloader, f"{server.url}/x")
    assert spool.read_bytes() == IMAGE
    assert facts.media_type == "image/png"
    assert len(server.requests) == len(failures) + 1
    assert stopped.sleeps == WAITS[: len(failures)]


def rest(start: int, *, total: str = str(len(IMAGE)), etag: str = '"v1"') -> Behaviour:
    headers = {"Content-Range": f"bytes {start}-{len(IMAGE) - 1}/{total}", "ETag": etag}
    return answer(206, IMAGE[start:], headers)


def test_a_cut_download_is_resumed(server: HostileServer, downloader: Downloader) -> None:
    """With a strong ETag only the rest is asked for, as often as it is cut; a fault in between loses nothing."""
    first = cut(IMAGE, 70_000, headers={"ETag": '"v1"'})
    second = raw(
        head(206, {"Content-Range": f"bytes 70000-200000/{len(IMAGE)}", "Content-Length": "130001"})
        + IMAGE[70_000:150_000]
    )
    server.play(first, second, answer(503), rest(150_000, total="*"))
    spool, _ = fetch(downloader, f"{server.url}/x")
    assert spool.read_bytes() == IMAGE
    assert [request.headers.get("range") for request in server.requests] == [
        None, "bytes=70000-", "bytes=150000-", "bytes=150000-",
    ]  # fmt: skip
    assert {request.headers.get("if-range") for request in server.requests[1:]} == {'"v1"'}


STALE: dict[str, tuple[str, list[Behaviour], str | None]] = {
    "changed meanwhile": ('"v1"', [answer(200, IMAGE)], "bytes=70000-"),
    "weak tag": ('W/"v1"', [answer(200, IMAGE)], None),
    "no tag": ("", [answer(200, IMAGE)], None),
    "another part": ('"v1"', [rest(60_000), answer(200, IMAGE)], "bytes=70000-"),
    "no range given": ('"v1"', [answer(206, IMAGE[70_000:]), answer(200, IMAGE)], "bytes=70000-"),
    "no such range": ('"v1"', [answer(416), answer(200, IMAGE)], "bytes=70000-"),
}


@pytest.mark.parametrize(("etag", "then", "asked"), STALE.values(), ids=STALE)
def test_a_download_that_can_not_be_resumed_is_restarted(
    server: HostileServer, downloader: Downloader, etag: str, then: list[Behaviour], asked: str | None
) -> None:
    """Parts of two images are never put together: what does not fit is fetched anew."""
    other = png(9, 9, noise=200_000)
    server.play(cut(other, 70_000, headers={"ETag": etag} if etag else {}), *then)
    spool, facts = fetch(downloader, f"{server.url}/x")
    assert (spool.read_bytes(), facts.width) == (IMAGE, 16)
    assert server.requests[1].headers.get("range") == asked
    assert server.requests[-1].headers.get("range") in (asked if len(then) == 1 else None, None)


def test_compressed_images_are_undone_but_not_resumed(server: HostileServer, downloader: Downloader) -> None:
    """Gzip is read though nobody asked for it; a part of it is of no use."""
    packed = gzip.compress(IMAGE)
    encoded = {"Content-Encoding": "gzip", "ETag": '"v1"'}
    server.play(cut(packed, len(packed) - 5, headers=encoded), answer(200, packed, encoded))
    assert fetch(downloader, f"{server.url}/x")[0].read_bytes() == IMAGE
    assert "range" not in server.requests[1].headers


def test_the_host_may_ask_to_wait(
    server: HostileServer, downloader: Downloader, stopped: StoppedClock
) -> None:
    """Retry-After is honoured up to half a minute."""
    server.play(
        answer(503, b"", {"Retry-After": "7"}), answer(503, b"", {"Retry-After": "600"}), answer(200, IMAGE)
    )
    fetch(downloader, f"{server.url}/x")
    assert stopped.sleeps == [7, 30]


def test_what_never_comes_is_given_up(
    server: HostileServer, downloader: Downloader, stopped: StoppedClock
) -> None:
    """After the last try the error tells of tries, time and status, not of the URL."""
    server.play(answer(404, b"<Error>no such key</Error>"))
    error = refused(downloader, f"{server.url}/x?{SECRET}", "HTTP 404")
    assert (error.attempts, error.status_code, error.elapsed) == (FIRST, 404, sum(WAITS))
    assert len(server.requests) == FIRST


@pytest.mark.parametrize(("patience", "tries"), [(0, 1), (0.5, 1), (5, 4), (900, 35)])
def test_patience_is_for_how_long_it_is_tried(
    server: HostileServer, downloader: Downloader, patience: float, tries: int
) -> None:
    """An image is fetched once at least, and tried again for all of the patience."""
    server.play(answer(404))
    error = refused(downloader, f"{server.url}/x", "HTTP 404", patience=patience)
    assert error.attempts == len(server.requests) == tries
    assert patience - 30 <= error.elapsed <= patience


def test_a_stop_ends_the_wait_of_who_says_so(server: HostileServer, downloader: Downloader) -> None:
    """Where the URL is kept elsewhere, a stop is heeded, and without one nothing ends the tries early."""
    stop = Stop()
    stop.set("enough")
    server.play(answer(404))
    assert refused(downloader, f"{server.url}/x", "HTTP 404", stop=stop).attempts == 1


def test_a_dripping_image_does_not_outlast_the_patience(server: HostileServer) -> None:
    """A host that never comes to an end is left when the patience, and the time for one try, are over."""
    server.play(drip(IMAGE, size=1000, pause=0.05))
    with contextlib.closing(Downloader(reach=ANYWHERE, try_timeout=0.2)) as impatient:
        assert refused(impatient, f"{server.url}/x", "too long", patience=0.1).attempts == 1


def test_a_drip_of_headers_does_not_outlast_the_patience(server: HostileServer) -> None:
    """A host that never stops beginning its answer is left when the time for one image is over."""
    outlasted = []

    def drip_headers(wire: Wire) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(100):
            wire.send(b"x")
            wire.wait(0.05)
        outlasted.append(True)
        return False

    server.play(drip_headers)
    with contextlib.closing(Downloader(reach=ANYWHERE, try_timeout=0.3)) as impatient:
        refused(impatient, f"{server.url}/x", "too long", patience=0)
    assert not outlasted


def test_five_redirects_and_no_more(server: HostileServer, downloader: Downloader) -> None:
    """Five redirects of any kind are followed, relative ones too; a sixth is refused at once."""
    hops = [redirect(f"/{status}", status) for status in (301, 302, 303, 307, 308)]
    server.play(*hops, answer(200, IMAGE))
    assert fetch(downloader, f"{server.url}/x")[0].read_bytes() == IMAGE
    assert not any("cookie" in request.headers for request in server.requests)
    server.play(redirect("x"))
    refused(downloader, f"{server.url}/x", "more than 5 redirects")
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1", "http://:80:80/", "\x7f://"]
)
def test_a_redirect_into_nowhere(server: HostileServer, downloader: Downloader, target: str) -> None:
    """A redirect to what is no web address ends the download."""
    server.play(redirect(target))
    refused(downloader, f"{server.url}/x", "URL")
    assert len(server.requests) == 1


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
NO_URLS = [
    "",
    "x",
    "/x.png",
    "data:image/png;base64,aGk=",
    "ftp://h/x",
    "http://127.0.0.1:99999/",
    "http://\udcff/",
]


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url(downloader: Downloader, url: str) -> None:
    """An item's URL may be anything."""
    refused(downloader, url, "URL")


@given(
    st.text(max_size=30), st.sampled_from(["", "http://", "https://h", "http://[::1]:", "http://127.0.0.1:"])
)
def test_no_text_is_more_than_a_failed_download(text: str, start: str) -> None:
    """Whatever stands in the place of a URL, the error is a DownloadError."""

    class Unknown(type(ANYWHERE)):
        def resolve(self, host: str) -> list[str]:
            raise socket.gaierror(-2, f"{host}: name or service not known")

    downloader = Downloader(reach=Unknown(), clock=StoppedClock(), ssl_context=NO_TLS)
    with pytest.raises(DownloadError):
        fetch(downloader, start + text)


def test_a_redirect_without_location_is_an_answer(server: HostileServer, downloader: Downloader) -> None:
    """A 302 that leads nowhere is a failure like any other status."""
    server.play(answer(302), answer(200, IMAGE))
    assert fetch(downloader, f"{server.url}/x")[0].size_bytes == len(IMAGE)


@pytest.mark.parametrize(
    "behaviour",
    [
        raw(head(200, {"Content-Length": "1000001"})),
        raw(head(200) + png(noise=1_000_000)),
        answer(200, gzip.compress(bytes(2_000_000)), {"Content-Encoding": "gzip"}),
    ],
    ids=["announced", "unannounced", "compressed"],
)
def test_too_large(server: HostileServer, downloader: Downloader, behaviour: Behaviour) -> None:
    """More than the limit is not read, announced or not, and not tried again."""
    server.play(behaviour)
    assert refused(downloader, f"{server.url}/x", "larger than 1,000,000 bytes").attempts == 1


def test_no_room(server: HostileServer, downloader: Downloader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is an error that says so."""
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    server.play(answer(200, IMAGE))
    refused(downloader, f"{server.url}/x", "temporary file")


def test_a_failed_download_costs_no_other_image(server: HostileServer, client: TTAPIClient) -> None:
    """Where one of several images can't be fetched, the others, which are paid, are given."""
    document = {"data": [{"url": f"{server.url}/{name}.png"} for name in "ab"]}
    server.play(answer(200, document), *[answer(404)] * FIRST, answer(200, IMAGE))
    (image,) = client.generate(ImageRequest(prompt="cats", n=2)).images
    assert (image.index, image.read_bytes()) == (1, IMAGE)
    assert [request.method for request in server.requests].count("POST") == 1


def test_a_failed_download_never_asks_for_another_image(server: HostileServer, client: TTAPIClient) -> None:
    """The request was answered, hence paid: the error says so, and the API hears of it once."""
    document = {"data": [{"url": f"{server.url}/x.png?{SECRET}"}]}
    server.play(answer(429), answer(200, document, {"X-Request-Id": "r-3"}), answer(410))
    with pytest.raises(DownloadError, match="HTTP 410") as caught:
        client.generate(CAT)
    assert [request.method for request in server.requests] == ["POST", "POST"] + ["GET"] * FIRST
    error = caught.value
    assert (error.attempts, error.request_id, error.outcome) == (2, "r-3", Outcome.UNUSABLE)
    assert error.answer is not None
    assert json.loads(error.answer.body.read_bytes()) == document


def test_an_answer_that_could_not_be_fetched_is_read_again(
    server: HostileServer, client: TTAPIClient
) -> None:
    """What came is kept with the error: later its image is fetched, and the API is not asked."""
    document = {"data": [{"url": f"{server.url}/x.png"}], "usage": {"total_tokens": 7}, "created": 3}
    server.play(answer(200, document, {"X-Request-Id": "r-4"}), answer(404))
    with pytest.raises(DownloadError) as caught:
        client.generate(CAT, patience=0)
    kept = caught.value.answer
    assert kept is not None
    with pytest.raises(DownloadError) as caught:
        client.read_again(CAT, kept, patience=0)
    assert (caught.value.answer, caught.value.request_id) == (kept, "r-4")
    assert [request.method for request in server.requests] == ["POST", "GET", "GET"]
    server.play(answer(200, IMAGE))
    again = client.read_again(CAT, kept)
    assert again.images[0].read_bytes() == IMAGE
    assert (again.usage and again.usage.total_tokens, again.created, again.request_id) == (7, 3, "r-4")
    assert [request.method for request in server.requests] == ["GET"]
