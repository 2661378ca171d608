"""One request and its answer over httpx: what came, or where it broke."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from itertools import chain
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from prefect_ttapi.origins import is_loopback
from prefect_ttapi.wire.bodies import BodyEndsEarly, BodyError, decoded
from prefect_ttapi.wire.clock import Clock
from prefect_ttapi.wire.outcomes import (
    BREAKS,
    MODERATED,
    UNUSABLE,
    Break,
    Verdict,
    judge_status,
    read_retry_after,
)
from prefect_ttapi.wire.payload import is_moderation, read_error
from prefect_ttapi.wire.redaction import Redactor, quiet
from prefect_ttapi.wire.retries import Failure, Guard

PATH: Final = "/v1/images/generations"

#: Seconds that an idle connection is kept for the next request. Servers close idle connections after 5 s or
#: more; a request that meets the closing would have an unknown outcome, a new connection costs next to
#: nothing.
KEEPALIVE: Final = 2.0

_ERROR_BODY_BYTES: Final = 64 * 1024
_ERROR_BODY_SECONDS: Final = 10.0

#: The first one that fits counts. What is not in here is taken for LOST: a doubt.
_BREAKS: Final[Mapping[type[Exception], Break]] = {
    httpx.ConnectError: Break.CONNECTING,
    httpx.ConnectTimeout: Break.CONNECTING,
    httpx.PoolTimeout: Break.CONNECTING,
    httpx.ProxyError: Break.CONNECTING,
    httpx.UnsupportedProtocol: Break.CONNECTING,
    httpx.WriteError: Break.SENDING,
    httpx.WriteTimeout: Break.SENDING,
    httpx.ReadTimeout: Break.SILENT,
}

_REQUEST_IDS: Final = ("x-request-id", "request-id", "x-amzn-requestid", "cf-ray")


class Broken(Exception):  # noqa: N818 - raised to be turned into a Failure
    """The answer broke off while it was read."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


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
        phase = event.partition(".")[2]
        if phase == "send_request_headers.started":  # a proxy is asked for the way first
            self.unwritten = getattr(info.get("request"), "method", b"") == b"CONNECT"
            if not self.unwritten:
                self._guard.confirm()
        elif phase in ("send_request_headers.failed", "send_request_body.failed"):
            self.unwritten = True


class _Redirected(Exception):  # noqa: N818 - raised to get past httpx
    def __init__(self, response: httpx.Response) -> None:
        super().__init__("a redirect")
        self.response = response


def _stop_redirects(response: httpx.Response) -> None:
    # httpx would look at the Location, and fail if it is broken, even where it is not to follow
    if response.is_redirect:
        raise _Redirected(response)


class Opened:
    """A 2xx of which the headers have arrived. Close it."""

    def __init__(self, response: httpx.Response, exchange: Exchange) -> None:
        self._response = response
        self._exchange = exchange
        self.status_code = response.status_code
        self.request_id = exchange.request_id(response)
        self.media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        # without a length, only the body itself can tell whether it is all there
        self._ends_with_connection = response.status_code != 204 and not (
            {"content-length", "transfer-encoding"} & response.headers.keys()
        )
        self._body = self._decoded()

    def chunks(self) -> Iterator[bytes]:
        """The body's bytes as they arrive.

        Raises:
            Broken: the body did not arrive in full, or can't be decompressed.
        """
        return self._body

    def peek(self) -> bytes:
        """The first piece of the body, which `chunks` gives all the same; empty where there is none.

        Raises:
            Broken: as for `chunks`.
        """
        first = next(self._body, b"")
        self._body = chain([first], self._body)
        return first

    def _decoded(self) -> Iterator[bytes]:
        failure = None
        try:
            yield from decoded(self._raw(), self._response.headers.get("content-encoding", ""))
        except BodyEndsEarly as error:
            failure = self.ends_early(str(error))
        except BodyError as error:
            failure = self.failure(UNUSABLE, str(error))
        if failure:
            raise Broken(failure)

    def ends_early(self, message: str) -> Failure:
        """A body that came in full by its length, yet is only the beginning of an answer, or was cut."""
        return self.failure(BREAKS[Break.CUT] if self._ends_with_connection else UNUSABLE, message)

    def _raw(self) -> Iterator[bytes]:
        raw = self._response.iter_raw()
        while True:
            failure = None
            with quiet():
                try:
                    chunk = next(raw, None)
                except httpx.TransportError as error:
                    broke = Break.SILENT if isinstance(error, httpx.TimeoutException) else Break.CUT
                    failure = self.failure(BREAKS[broke], broke)
            if failure:
                raise Broken(failure)
            if chunk is None:
                return
            yield chunk

    def failure(self, verdict: Verdict, message: str) -> Failure:
        """This answer as a failure."""
        return Failure(verdict, self._exchange.clean(message), self.status_code, self.request_id)

    def close(self) -> None:
        """Give the connection back, or close it where the body was not read to its end."""
        with quiet():
            self._response.close()


class Exchange:
    """Sends requests to one address; thread-safe."""

    def __init__(
        self,
        base_url: str,
        api_key: SecretStr,
        *,
        timeout: httpx.Timeout,
        ssl_context: ssl.SSLContext,
        redactor: Redactor,
        clock: Clock,
    ) -> None:
        self._url = base_url + PATH
        self._api_key = api_key
        self.clean = redactor.clean
        self._clock = clock
        make_client = partial(
            httpx.Client,
            timeout=timeout,
            verify=ssl_context,
            # proxies come from the environment; plain http, which is for this machine, would show one the key
            trust_env=not is_loopback(urlsplit(base_url).hostname or ""),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            headers={"User-Agent": "prefect-ttapi", "Accept-Encoding": "identity"},
            event_hooks={"response": [_stop_redirects]},
        )
        # how many requests are in flight is the caller's to say
        self._http = make_client(limits=httpx.Limits(keepalive_expiry=KEEPALIVE))
        # who fails often hangs up afterwards, and a repeated send must not run into that
        self._fresh = make_client(limits=httpx.Limits(max_keepalive_connections=0))

    def close(self) -> None:
        """Close all connections."""
        with quiet():
            self._http.close()
            self._fresh.close()

    def open(self, body: Mapping[str, Any], accept: str, guard: Guard, number: int) -> Opened | Failure:
        """Send `body`, for the `number`-th time, and wait for the headers of the answer."""
        sending = Sending(guard)
        http = self._http if number == 1 else self._fresh
        request = http.build_request(
            "POST",
            self._url,
            json=body,
            headers={"Accept": accept, "TT-API-KEY": self._api_key.get_secret_value()},
            extensions={"trace": sending},
        )
        with quiet():
            try:
                response = http.send(request, stream=True)
            except _Redirected as redirected:
                return self._redirected(redirected.response)
            except httpx.TransportError as error:
                return self._broken(error, sending)
        if response.is_success:
            return Opened(response, self)
        with quiet():
            return self._refused(response)

    def _broken(self, error: httpx.TransportError, sending: Sending) -> Failure:
        broke = next((found for kind, found in _BREAKS.items() if isinstance(error, kind)), Break.LOST)
        if sending.unwritten and broke is not Break.CONNECTING:
            broke = Break.SENDING
        # the operating system's words; those about a broken protocol quote the server's bytes
        spoken = isinstance(error, httpx.NetworkError | httpx.TimeoutException) and str(error)
        return Failure(BREAKS[broke], self.clean(f"{broke}: {spoken or type(error).__name__}"))

    def _redirected(self, response: httpx.Response) -> Failure:
        status = response.status_code
        what = "the API answered with a redirect, which is never followed: the key is for base_url only"
        return Failure(judge_status(status), what, status, self.request_id(response))

    def _refused(self, response: httpx.Response) -> Failure:
        error = read_error(self._error_body(response), response.headers.get("content-type"))
        verdict = judge_status(response.status_code)
        return Failure(
            MODERATED if response.status_code == 400 and is_moderation(error) else verdict,
            self.clean(error.message),
            response.status_code,
            self.request_id(response),
            read_retry_after(response.headers, self._clock.now()),
        )

    def _error_body(self, response: httpx.Response) -> bytes:
        # its words are worth a few seconds, no more; httpcore reads this when the body's first byte is asked
        # for
        timeouts = response.request.extensions["timeout"]
        timeouts["read"] = min(timeouts["read"], _ERROR_BODY_SECONDS)
        deadline = self._clock.monotonic() + _ERROR_BODY_SECONDS
        body = b""
        try:
            for chunk in decoded(response.iter_raw(), response.headers.get("content-encoding", "")):
                body += chunk
                if len(body) > _ERROR_BODY_BYTES or self._clock.monotonic() > deadline:
                    break
        except (httpx.TransportError, BodyError):
            pass  # the status says what matters
        finally:
            response.close()
        return body

    def request_id(self, response: httpx.Response) -> str | None:
        """The API's id of the call, where it sent one."""
        found = (response.headers.get(name) for name in _REQUEST_IDS)
        return next((self.clean(request_id)[:100] for request_id in found if request_id), None)
