"""One request and its answer over httpx: what came, or where it broke."""

from __future__ import annotations

import logging
import ssl
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from itertools import chain
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pybase64
from pydantic import SecretStr

from prefect_ttapi.api.answers import Body
from prefect_ttapi.api.json_stream import Base64, DecodingError, EarlyEnd, Reading
from prefect_ttapi.api.limiter import Clock
from prefect_ttapi.api.outcomes import (
    BREAKS,
    UNUSABLE,
    Break,
    BrokenOff,
    ErrorBody,
    Failure,
    Verdict,
    judge,
    read_retry_after,
)
from prefect_ttapi.api.payload import UnusableAnswer, read_error
from prefect_ttapi.api.redaction import Redactor, quiet
from prefect_ttapi.api.retries import Guard
from prefect_ttapi.errors import Outcome
from prefect_ttapi.images.spool import IN_MEMORY, Spool
from prefect_ttapi.origins import is_loopback
from prefect_ttapi.results import RawAnswer

log: Final = logging.getLogger(__name__)

PATH: Final = "/v1/images/generations"

#: Each request has a connection of its own, which costs next to nothing beside an image. One that has been idle may be
#: closed while a request is under way on it, whose outcome is then unknown: by the server, or by httpcore's pool for
#: another thread (https://github.com/encode/httpcore/issues/1110).
ONCE: Final = {"Connection": "close"}

_ERROR_BODY_BYTES: Final = 64 * 1024
_ERROR_BODY_SECONDS: Final = 10.0

#: Any other error is taken for LOST, the more doubtful outcome.
_BREAKS: Final[Mapping[Break, tuple[type[Exception], ...]]] = {
    Break.CONNECTING: (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol),
    Break.SENDING: (httpx.WriteError, httpx.WriteTimeout),
    Break.SILENT: (httpx.ReadTimeout,),
}

#: Events of httpcore's trace, without their protocol ("http11."), that tell that a request is about to be written,
#: and that it was certainly not written in full. httpx documents their names ("Extensions", "trace"), and that they
#: may change with httpcore's version: what has another name counts as written.
WRITING: Final = "send_request_headers.started"
UNWRITTEN: Final = frozenset({"send_request_headers.failed", "send_request_body.failed"})

_REDIRECTED: Final = "the API answered with a redirect, which is never followed: the key is for base_url only"
_REQUEST_IDS: Final = ("x-request-id", "request-id", "x-amzn-requestid", "cf-ray")

#: Bytes of an answer's body that are kept: ten images of 16 MB have fewer.
MOST_KEPT: Final = 256 * 1024**2

#: What may be wrong with the body of an answer that came.
UNREADABLE: Final = (BrokenOff, DecodingError, UnusableAnswer, OSError)


class Sending:
    """Follows httpcore's trace to know whether the request was certainly not written in full.

    Whatever the trace does not say counts as written: a doubt must not make a request be sent, and paid,
    twice.

    Args:
        guard: asked once the connection stands; what it raises ends the request unwritten.
    """

    def __init__(self, guard: Guard) -> None:
        self.unwritten = False
        self._guard = guard

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        """Take an event of httpcore's trace."""
        phase = event.partition(".")[2]
        if phase == WRITING:  # a proxy is asked for the way first
            self.unwritten = getattr(info.get("request"), "method", b"") == b"CONNECT"
            if not self.unwritten:
                self._guard.confirm()
        elif phase in UNWRITTEN:
            self.unwritten = True


def _forget_location(response: httpx.Response) -> None:
    # httpx would look at it, and fail if it is broken, even where it is not to follow
    response.headers.pop("location", None)


def judge_unreadable(
    error: Exception, prompt: str, status: int = 200, *, began: bool = True
) -> tuple[Verdict, str]:
    """Return what it means that the body of a 2xx gave no images, and why, in words.

    Args:
        error: one of `UNREADABLE`.
        prompt: the request's, which the answer may repeat.
        status: of the answer.
        began: there is a body, of which more may have been meant to come.
    """
    if isinstance(error, BrokenOff):
        return BREAKS[error.broke], str(error)
    if isinstance(error, EarlyEnd) and began:
        return BREAKS[Break.CUT], str(error)
    if isinstance(error, UnusableAnswer) and error.reported is not None:
        verdict = judge(status, error.reported, prompt)
        is_known = error.is_failure or verdict.error.outcome is not Outcome.UNUSABLE
        return verdict if is_known else UNUSABLE, str(error)
    if isinstance(error, OSError):
        return UNUSABLE, f"the answer could not be kept in a temporary file: {error.strerror}"
    return UNUSABLE, str(error)


def may_be_paid(verdict: Verdict) -> bool:
    """Tell whether an answer is worth keeping: a refusal has no images."""
    return verdict.error.outcome in (Outcome.UNKNOWN, Outcome.UNUSABLE, Outcome.SERVER_FAULT)


class Tee:
    """Keeps a body while it is read, up to `MOST_KEPT` bytes, for whoever could not make images of it.

    Nearly all of a body is base64 whose images are in temporary files already: of that, it is enough to know where it
    stood. The rest is written to a file.
    """

    def __init__(self) -> None:
        self.reading = Reading()
        self.size = 0
        self._rest: Spool | None = Spool(hashing=False, in_memory=4 * IN_MEMORY)  # no file for one image
        self._runs: list[tuple[Spool, int, int]] = []  # of the rest, or of the characters of an image
        self._pending: deque[tuple[bytes, Base64 | None, int]] = deque()
        self._chunk = b""  # the one that is being read

    @property
    def is_full(self) -> bool:
        """Whether no more is kept."""
        return self._rest is None or self.size >= MOST_KEPT

    def through(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Yield `chunks`, and look at each once it is read."""
        for chunk in chunks:
            image = self.reading.image
            start = image.received if image else 0
            self._chunk = b"" if self.is_full else chunk[: MOST_KEPT - self.size]
            self.size += len(self._chunk)
            yield chunk
            self._pending.append((self._chunk, image if image is self.reading.image else None, start))
            self._chunk = b""
            self._settle()

    def body(self) -> Spool | None:
        """Return what came, or None where that is nothing."""
        self._pending.append((self._chunk, None, 0))
        self._chunk = b""
        self.reading.image = None  # nothing more is decoded
        self._settle()
        if self._rest is None or not self.size:
            return None
        pieces = (
            _raw(spool, start, end) if spool is self._rest else _as_base64(spool, start, end)
            for spool, start, end in self._runs
        )
        return Spool.of(chain.from_iterable(pieces), hashing=False)

    def _settle(self) -> None:
        while self._pending:
            chunk, image, start = self._pending[0]
            if image is not None and image.is_verbatim and image.decoded >= start + len(chunk):
                self._add(image.spool, start, start + len(chunk))
            elif image is not None and image.is_verbatim and image is self.reading.image:
                return  # it is decoded soon
            else:
                self._write(chunk)
            self._pending.popleft()

    def _write(self, chunk: bytes) -> None:
        if self._rest is None:
            return
        start = self._rest.size_bytes
        try:
            self._rest.write(chunk)
        except OSError as error:  # the images may be had all the same
            log.warning("an answer is read without being kept: %s", error.strerror)
            self._rest = None
        else:
            self._add(self._rest, start, start + len(chunk))

    def _add(self, spool: Spool, start: int, end: int) -> None:
        if self._runs and self._runs[-1][0] is spool and self._runs[-1][2] == start:
            start = self._runs.pop()[1]
        self._runs.append((spool, start, end))


_STEP: Final = 48 * 1024  # bytes, which are 64 KiB of base64


def _raw(spool: Spool, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, _STEP):
        yield spool.read_at(at, min(_STEP, end - at))


def _as_base64(spool: Spool, start: int, end: int) -> Iterator[bytes]:
    """Yield the characters from `start` to `end` of what an image was in base64."""
    for at in range(start // 4 * 3, (end + 3) // 4 * 3, _STEP):
        text, first = pybase64.b64encode(spool.read_at(at, _STEP)), at // 3 * 4
        yield text[max(0, start - first) : end - first]


class Opened:
    """A 2xx of which the headers have arrived, to a request with this prompt. Close it."""

    def __init__(
        self, response: httpx.Response, request_id: str | None, redactor: Redactor, prompt: str
    ) -> None:
        self._response = response
        self._redactor = redactor
        self._tee = Tee()
        self._prompt = prompt
        self._chunks: Iterator[bytes] = iter(())
        self.request_id = request_id
        self.media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()

    def body(self) -> Body:
        """Return the body, whose chunks raise what follows.

        Raises:
            BrokenOff: the body did not arrive in full.
            DecodingError: it can't be decompressed.
        """
        chunks = decoded(self._raw(), self._response.headers.get("content-encoding", ""))
        self._chunks = self._tee.through(chunks)
        return Body(self._chunks, self.media_type, self._tee.reading)

    def answer(self) -> RawAnswer | None:
        """Return what was read so far."""
        try:
            body = self._tee.body()
        except OSError as error:
            log.warning("an answer that can't be read can't be kept: %s", error.strerror)
            return None
        return RawAnswer(body, self.media_type, self.request_id) if body else None

    def _raw(self) -> Iterator[bytes]:
        raw = self._response.iter_raw()
        while True:
            with quiet():
                try:
                    chunk = next(raw, None)
                except httpx.TimeoutException:
                    raise BrokenOff(Break.SILENT) from None
                except httpx.TransportError:
                    raise BrokenOff(Break.CUT) from None
            if chunk is None:
                return
            yield chunk

    def failure(self, error: Exception) -> Failure:
        """Return this answer as a failure, because of `error`, which is one of `UNREADABLE`."""
        status, began = self._response.status_code, self._tee.size > 0 or self._ends_with_connection
        verdict, message = judge_unreadable(error, self._prompt, status, began=began)
        if isinstance(error, DecodingError):
            self._read_on()
        answer = self.answer() if may_be_paid(verdict) else None
        return Failure(verdict, self._redactor.clean(message), status, self.request_id, answer=answer)

    def _read_on(self) -> None:
        """Keep the rest of a body that can't be read."""
        with suppress(BrokenOff, DecodingError):
            while not self._tee.is_full and next(self._chunks, None) is not None:
                pass

    @property
    def _ends_with_connection(self) -> bool:
        """Tell whether only the body itself can tell if it is all there, as it has no length."""
        lengths = {"content-length", "transfer-encoding"}
        return self._response.status_code != 204 and not lengths & self._response.headers.keys()

    def close(self) -> None:
        """Close the connection."""
        with quiet():
            self._response.close()


class Transport:
    """Sends requests to one address; thread-safe."""

    def __init__(
        self,
        base_url: str,
        api_key: SecretStr,
        *,
        timeout: httpx.Timeout,
        ssl_context: ssl.SSLContext,
        clock: Clock,
    ) -> None:
        self._url = base_url + PATH
        self._api_key = api_key
        self._redactor = Redactor(api_key)
        self._clock = clock
        self._http = httpx.Client(
            timeout=timeout,
            verify=ssl_context,
            # proxies come from the environment; plain http, which is for this machine, would show one the key
            trust_env=not is_loopback(urlsplit(base_url).hostname or ""),
            # how many requests are in flight is the caller's to say
            limits=httpx.Limits(),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            headers={"User-Agent": "prefect-ttapi", "Accept-Encoding": "identity", **ONCE},
            event_hooks={"response": [_forget_location]},
        )

    def close(self) -> None:
        """Close all connections."""
        with quiet():
            self._http.close()

    def open(self, body: Mapping[str, Any], guard: Guard) -> Opened | Failure:
        """Send `body`, and wait for the headers of the answer."""
        sending = Sending(guard)
        request = self._http.build_request(
            "POST",
            self._url,
            json=body,
            headers={
                "Accept": "text/event-stream" if body.get("stream") else "application/json",
                "TT-API-KEY": self._api_key.get_secret_value(),
            },
            extensions={"trace": sending},
        )
        with quiet():
            try:
                response = self._http.send(request, stream=True)
            except httpx.TransportError as error:
                return self._broken(error, sending)
            if not response.is_success:
                return self._refused(response, body["prompt"])
        return Opened(response, self._request_id(response), self._redactor, body["prompt"])

    def _broken(self, error: httpx.TransportError, sending: Sending) -> Failure:
        broke = next((found for found, kinds in _BREAKS.items() if isinstance(error, kinds)), Break.LOST)
        if sending.unwritten and broke is not Break.CONNECTING:
            broke = Break.SENDING
        # the operating system's words; those about a broken protocol quote the server's bytes
        spoken = isinstance(error, httpx.NetworkError | httpx.TimeoutException) and str(error)
        return Failure(BREAKS[broke], self._redactor.clean(f"{broke}: {spoken or type(error).__name__}"))

    def _refused(self, response: httpx.Response, prompt: str) -> Failure:
        status, request_id, wait = response.status_code, self._request_id(response), None
        if response.is_redirect:
            response.close()
            error = ErrorBody(_REDIRECTED)
        else:
            error = read_error(self._error_body(response), response.headers.get("content-type"))
            wait = read_retry_after(response.headers, self._clock.now())
        verdict = judge(status, error, prompt)
        return Failure(verdict, self._redactor.clean(error.message), status, request_id, wait)

    def _error_body(self, response: httpx.Response) -> bytes:
        # its words are worth a few seconds, no more; httpcore reads this when the body's first byte is asked
        # for
        timeouts = response.request.extensions["timeout"]
        timeouts["read"] = min(timeouts["read"], _ERROR_BODY_SECONDS)
        deadline = self._clock.monotonic() + _ERROR_BODY_SECONDS
        body = b""
        with closing(response), suppress(httpx.TransportError, DecodingError):  # the status says what matters
            for chunk in decoded(response.iter_raw(), response.headers.get("content-encoding", "")):
                body += chunk
                if len(body) > _ERROR_BODY_BYTES or self._clock.monotonic() > deadline:
                    break
        return body

    def _request_id(self, response: httpx.Response) -> str | None:
        """Return the API's id of the call, where it sent one."""
        found = (response.headers.get(name) for name in _REQUEST_IDS)
        return next((self._redactor.clean(text)[:100] for text in found if text), None)


#: zlib's window argument: 15 bits, with a gzip header, or with the zlib header that "deflate" means.
_WINDOWS: Final[Mapping[str, int]] = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_PIECE: Final = 64 * 1024


def decoded(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yield a body's own bytes, from `chunks` as they come from the network.

    Identity is what we ask for; gzip and deflate are undone all the same, a little at a time, so that a small
    body can't fill the memory.

    Raises:
        DecodingError: another encoding, or damaged data.
        EarlyEnd: the data is incomplete.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in _WINDOWS:
        raise DecodingError("the body has a Content-Encoding that was not asked for")
    inflate = zlib.decompressobj(_WINDOWS[encoding])
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                if inflate.eof:  # gzip files may follow one another
                    inflate = zlib.decompressobj(_WINDOWS[encoding])
                yield inflate.decompress(rest, _PIECE)
                rest = inflate.unconsumed_tail or inflate.unused_data
        yield inflate.flush()
    except zlib.error:
        raise DecodingError("the compressed body is damaged") from None
    if not inflate.eof:
        raise EarlyEnd("the compressed body ends early")
