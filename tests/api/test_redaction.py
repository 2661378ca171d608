"""The key and signed queries are nowhere but on the wire, at debug level too, whatever a server repeats."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from urllib.parse import quote

import httpx
import pytest
from pydantic import SecretStr

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.redaction import LONGEST_MESSAGE, Redactor, checked_key, quiet
from prefect_ttapi.errors import TTAPIError
from prefect_ttapi.requests import ImageRequest
from tests.support.clocks import StoppedClock
from tests.support.hostile import (
    Behaviour,
    HostileServer,
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

KEY = 'tt-MARKED/key"with+odd\\characters'
SIGNED = "X-Signature=s3cr3t"
SECRETS = (KEY, KEY.lower(), quote(KEY, safe=""), json.dumps(KEY)[1:-1], "s3cr3t")
CAT = ImageRequest(prompt="a cat", model="gpt-image-1")

SAID = f"no such key: {KEY} ({KEY.lower()}), see https://host/help?{SIGNED} or http://h/#{SIGNED}"
REPEATED = {
    "X-Request-Id": f"id {KEY} {SIGNED}".replace(SIGNED, ""),
    "X-Echo": f"{KEY} {SIGNED}",
    "Set-Cookie": f"key={quote(KEY)}; {SIGNED}",
    "ETag": f'"{KEY}"',
}
REASON = head(400, {"Content-Length": "0"}, reason=f"Bad {KEY} {SIGNED}")


def url(path: str) -> str:
    return f"{{server}}/{path}{quote(KEY, safe='')}.png?{SIGNED}&key={quote(KEY)}"


def by_url(address: str) -> Callable[[str], Behaviour]:
    return lambda server: answer(200, {"data": [{"url": address.format(server=server)}]}, REPEATED)


FAILURES: dict[str, list[Behaviour | Callable[[str], Behaviour]]] = {
    **{
        str(status): [answer(status, {"error": {"message": SAID}}, {**REPEATED, "Retry-After": "1"})]
        for status in (400, 401, 402, 403, 404, 422, 429, 499, 500, 503, 504, 520)
    },
    "vendor's error": [answer(400, {"status": "FAILED", "message": SAID}, REPEATED)],
    "html": [answer(502, f"<h1>{SAID}</h1>".encode(), {**REPEATED, "Content-Type": "text/html"})],
    "escaped": [answer(400, b'{"message": "' + "".join(f"\\u{ord(c):04x}" for c in SAID).encode() + b'"}')],
    "long": [answer(400, {"message": "x" * (LONGEST_MESSAGE - 9) + " " + SAID})],
    "reason phrase": [raw(REASON)],
    "status line": [raw(f"HTTP/1.1 {KEY} {SIGNED}\r\n\r\n".encode())],
    "header line": [raw(f"HTTP/1.1 200 OK\r\n{KEY} {SIGNED}\r\n\r\n".encode())],
    "chunk size": [raw(head(200, {"Transfer-Encoding": "chunked"}) + f"{KEY} {SIGNED}\r\n".encode())],
    "redirect": [answer(302, b"", {"Location": f"https://host/{KEY}?{SIGNED}", **REPEATED})],
    "bad redirect": [answer(302, b"", {"Location": f"http://[{KEY}", **REPEATED})],
    "failed": [answer(200, {"status": "FAILED", "message": SAID}, REPEATED)],
    "no JSON": [answer(200, SAID.encode(), REPEATED)],
    "no images": [answer(200, {"data": [], "echo": SAID})],
    "no image": [answer(200, answered(SAID.encode()))],
    "encoding": [answer(200, b"x", {"Content-Encoding": f"{KEY}"})],
    "cut": [cut(answered(png()), 50, headers=REPEATED)],
    "reset": [reset()],
    "closed": [close()],
    "silent": [stall()],
    "silent body": [stall(head(200, {"Content-Length": "9", **REPEATED}))],
    "stream error": [answer(200, b"data: %s\n\n" % json.dumps({"error": {"message": SAID}}).encode())],
    "download missing": [by_url(url("a")), answer(404, SAID.encode(), REPEATED)],
    "download redirected": [
        by_url(url("a")),
        answer(302, b"", {"Location": f"/b?{SIGNED}", **REPEATED}),
        answer(302, b"", {"Location": f"ftp://{quote(KEY)}/b?{SIGNED}"}),
    ],
    "download redirected badly": [by_url(url("a")), answer(302, b"", {"Location": f"http://[{KEY}?{SIGNED}"})],
    "download of a page": [by_url(url("a")), answer(200, SAID.encode(), REPEATED)],
    "download cut": [by_url(url("a")), cut(png(noise=1000), 500, headers=REPEATED)],
    "download refused": [by_url(f"http://127.0.0.1:1/{quote(KEY)}?{SIGNED}")],
    # no name server is asked for a name that is too long
    "download from nowhere": [by_url(f"http://{quote(KEY)}.{64 * 'a'}/?{SIGNED}")],
    "download of nothing": [by_url(f"{KEY}?{SIGNED}")],
}  # fmt: skip


class Everything(logging.Handler):
    """Keeps all that is logged anywhere, in every form."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{self.format(record)} {record.msg!r} {record.args!r}")


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """All lines of all loggers at debug level."""
    everything, root = Everything(), logging.getLogger()
    level = root.level
    root.addHandler(everything)
    root.setLevel(logging.DEBUG)
    yield everything.lines
    root.setLevel(level)
    root.removeHandler(everything)


@pytest.fixture(scope="module")
def secretive(server: HostileServer, stopped: StoppedClock) -> Iterator[TTAPIClient]:
    with TTAPIClient(KEY, server.url, read_timeout=0.1, max_attempts=2, clock=stopped) as client:
        yield client


def shown(error: BaseException) -> str:
    """Everything that an exception could show, with the locals of its frames."""
    formatted = traceback.TracebackException.from_exception(error, capture_locals=True)
    # the test's own frames know the key
    formatted.stack = traceback.StackSummary.from_list(
        frame for frame in formatted.stack if "/tests/" not in frame.filename
    )
    facts = (str(error), repr(error), vars(error), pickle.dumps(error), error.args)
    return "".join([*formatted.format(chain=True), *map(str, facts)])


def of_no_secret(text: str) -> None:
    assert [secret for secret in SECRETS if secret in text] == []


@pytest.mark.parametrize("behaviours", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("streamed", [False, True], ids=["generate", "stream"])
def test_no_failure_shows_a_secret(
    server: HostileServer,
    secretive: TTAPIClient,
    logged: list[str],
    behaviours: list[Behaviour],
    streamed: bool,
) -> None:
    """On every way to fail, with a server that repeats the key everywhere, no log and no error shows it."""
    server.play(*(b if b.__name__ == "behave" else b(server.url) for b in behaviours))
    with pytest.raises(TTAPIError) as caught:
        list(secretive.stream(CAT)) if streamed else secretive.generate(CAT)
    assert server.requests[0].headers["tt-api-key"] == KEY
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    of_no_secret(shown(error))
    of_no_secret("\n".join(logged))
    assert any(line.startswith("prefect_ttapi.api") for line in logged)
    assert any(line.startswith("httpcore") for line in logged)


def test_a_success_shows_no_secret(server: HostileServer, secretive: TTAPIClient, logged: list[str]) -> None:
    """Nor do logs and results of an answer with a signed URL."""
    server.play(
        by_url(url("a"))(server.url), answer(302, b"", {"Location": f"/b?{SIGNED}"}), answer(200, png())
    )
    of_no_secret(repr(secretive.generate(CAT)))
    assert len(server.requests) == 3
    of_no_secret("\n".join(logged))
    of_no_secret(repr(secretive) + str(vars(secretive)))


def test_others_keep_their_logs(server: HostileServer, logged: list[str]) -> None:
    """The records of other users of httpx in the same process stay whole."""
    server.play(answer(200, b"", {"X-Echo": "theirs"}))
    httpx.get(f"{server.url}/x?their=query")
    with quiet():
        httpx.get(f"{server.url}/x?our=query")
    text = "\n".join(logged)
    assert "their=query" in text
    assert "our=query" not in text
    assert sum("X-Echo" in line for line in logged) == 1


@pytest.mark.parametrize("key", ["", " ", "a b", "a\nb", "a\0", "ключ", "a\x7f"])
def test_a_key_that_no_header_takes(key: str) -> None:
    """Such a key would be shown by the error that the HTTP library raises for it: it is refused before."""
    for given in (key, SecretStr(key)):
        with pytest.raises(ValueError, match="api_key must be one word") as caught:
            checked_key(given)
        assert not key.strip() or key not in str(caught.value)


def test_messages_are_short_lines() -> None:
    """A server's words become one line of limited length; the key goes before it is cut."""
    redactor = Redactor(SecretStr("k" * 30))
    assert redactor.clean(" a\r\nb\x1b[31m\u2028c ") == "a b [31m c"
    text = redactor.clean("x" * (LONGEST_MESSAGE - 10) + "k" * 30)
    assert "kk" not in text
    assert len(redactor.clean("x" * 9_000)) == LONGEST_MESSAGE
    assert redactor.clean("http://h?" + "q" * 9_980 + " " + "k" * 30) == "http://h?..."
    assert redactor.clean("http://" * 20_000) == ""
