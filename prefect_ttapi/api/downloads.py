"""Fetching image URLs without trusting them.

A URL in an answer is a stranger's: it gets no key, no cookies, no proxy and no redirect that was not
checked. Its address is checked when it is connected to: a name is resolved once, and the connection goes to the very
address that was checked, so that a name that first shows a public address and then a private one (DNS rebinding) gains
nothing. Every URL was paid for, so fetching it is tried again for a while, also after 403 and 404: CDNs lag.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import ssl
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httpcore
import httpx
from pydantic import SecretStr

from prefect_ttapi.api.json_stream import DecodingError
from prefect_ttapi.api.limiter import Clock
from prefect_ttapi.api.outcomes import read_retry_after
from prefect_ttapi.api.redaction import quiet
from prefect_ttapi.api.transport import ONCE, decoded
from prefect_ttapi.errors import DownloadError
from prefect_ttapi.images.headers import ImageFacts, NotAnImage, read_image
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.origins import is_loopback
from prefect_ttapi.stopping import Stop, StopSending, backoff

log: Final = logging.getLogger(__name__)

MAX_REDIRECTS: Final = 5
MAX_IMAGE_BYTES: Final = 128 * 1024**2

#: Seconds for which an image is fetched where the caller does not say.
PATIENCE: Final = 300.0

#: Seconds before the second try, and at most before a later one; each wait is between half of it and all of it.
PAUSES: Final = (0.5, 30.0)
_LONGEST_WAIT: Final = PAUSES[1]  # that an image host may ask for

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,15})-[0-9]{1,15}/(?:[0-9]{1,15}|\*)", re.ASCII)

_BREAKS: Final[Mapping[type[Exception], str]] = {
    httpcore.ConnectError: "no connection",
    httpcore.TimeoutException: "it took too long",
    httpcore.ProtocolError: "the answer broke off, or is no HTTP",
    httpcore.NetworkError: "the connection broke",
    OSError: "the image could not be kept in a temporary file",
}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: What is assigned to hosts on the internet; 64:ff9b::, ::ffff: and others that lead elsewhere are not in it.
_IPV6_UNICAST: Final = ipaddress.ip_network("2000::/3")

#: "Global" by the registries, yet no host on the internet: tunnels into other networks, protocol assignments,
#: documentation, and Azure's address for the machine's own platform.
_LEAD_ELSEWHERE: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32",
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
    )
)  # fmt: skip

_MOST_TRIED: Final = 4  # addresses of one name: each may take a whole connect timeout


def is_public(address: Address) -> bool:
    """Tell whether `address` is a host on the internet.

    >>> [is_public(ipaddress.ip_address(text)) for text in ("8.8.8.8", "127.0.0.1", "::ffff:8.8.8.8")]
    [True, False, False]
    """
    return (
        address.is_global
        and not address.is_multicast
        and (address.version == 4 or address in _IPV6_UNICAST)
        and not any(address in network for network in _LEAD_ELSEWHERE)
    )


class Reach:
    """Where downloads may go: to hosts on the internet, by https."""

    schemes: tuple[str, ...] = ("https",)

    def allows(self, address: Address) -> bool:
        """Tell whether this address may be connected to."""
        return is_public(address)

    def resolve(self, host: str) -> list[str]:
        """Return the addresses of a name, in the order in which they should be tried.

        Raises:
            OSError, UnicodeError: it has none, or is none.
        """
        return [str(address[0]) for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


class _Anywhere(Reach):
    schemes = ("https", "http")

    def allows(self, address: Address) -> bool:  # noqa: ARG002 - as in Reach
        return True


PUBLIC: Final = Reach()
ANYWHERE: Final = _Anywhere()


def reach_from(base_url: str) -> Reach:
    """Return where images of an API at `base_url` may be: on the internet, unless the API itself is not.

    >>> reach_from("https://api.ttapi.io") is PUBLIC, reach_from("http://127.0.0.1:8000") is ANYWHERE
    (True, True)
    """
    host = urlsplit(base_url).hostname or ""
    try:
        local = not is_public(ipaddress.ip_address(host))
    except ValueError:
        local = is_loopback(host)
    return ANYWHERE if local else PUBLIC


class Problem(Exception):  # noqa: N818 - becomes a DownloadError
    """Why a try failed; `final` where another would fail as well."""

    def __init__(
        self, what: str, *, final: bool = False, status: int | None = None, wait: float = 0.0
    ) -> None:
        super().__init__(what)
        self.final = final
        self.status = status
        self.wait = wait


class Deadline(threading.local):
    """When the exchange that a thread has under way must be over; each thread has its own.

    A timeout for each byte alone lets a drip of bytes go on for ever.

    Attributes:
        at: on the clock's monotonic scale.
    """

    def __init__(self, clock: Clock) -> None:
        self.at = 0.0
        self._clock = clock

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.at - self._clock.monotonic()


class BoundedStream(httpcore.NetworkStream):
    """A connection on which no read waits for longer than is left."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read as usual.

        Raises:
            httpcore.ReadTimeout: nothing came in time, or no time is left.
        """
        left = self._deadline.left()
        if left <= 0:
            raise httpcore.ReadTimeout("no time is left")
        return self._stream.read(max_bytes, left if timeout is None else min(timeout, left))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write as usual: requests for images are a few lines, which no connection holds up."""
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Return the encrypted connection, with the same bound."""
        return BoundedStream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows about itself."""
        return self._stream.get_extra_info(info)


class CheckedBackend(httpcore.SyncBackend):
    """Opens connections to the addresses that `reach` allows, and to no others.

    Host header, SNI and certificate checks keep the name: httpcore takes them from the URL.
    """

    def __init__(self, reach: Reach, deadline: Deadline) -> None:
        self._reach = reach
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Return a connection to the first allowed address of `host` that accepts it.

        Raises:
            Problem: `host` has no allowed address.
            httpcore.ConnectError, httpcore.ConnectTimeout: no allowed address could be reached.
        """
        try:
            found = self._reach.resolve(host)
        except (OSError, UnicodeError):
            raise httpcore.ConnectError("the name could not be resolved") from None
        allowed = [address for address in found if self._is_allowed(address)]
        failure: Exception = Problem("its address is not on the public internet", final=True)
        for address in allowed[:_MOST_TRIED]:
            try:
                stream = super().connect_tcp(address, port, timeout, local_address, socket_options)
                return BoundedStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _is_allowed(self, address: str) -> bool:
        try:
            return self._reach.allows(ipaddress.ip_address(address))
        except ValueError:
            return False


@dataclass
class _Partial:
    """What has come of an image so far; a strong ETag lets the rest be asked for."""

    spool: Spool = field(default_factory=Spool)
    etag: str = ""

    @property
    def resumes(self) -> bool:
        return bool(self.spool.size_bytes and self.etag)

    @property
    def headers(self) -> dict[str, str]:
        wanted = {"Range": f"bytes={self.spool.size_bytes}-", "If-Range": self.etag}
        return wanted if self.resumes else {}

    def restart(self) -> None:
        self.spool, self.etag = Spool(), ""


class Downloader:
    """Fetches images; thread-safe.

    Args:
        reach: the schemes and addresses that may be fetched from.
        connect_timeout, read_timeout: seconds; the second bounds the silence between two bytes.
        try_timeout: seconds that a try may take, redirects and all, however little patience is left.
        max_bytes: the largest image.
    """

    def __init__(
        self,
        *,
        reach: Reach = PUBLIC,
        connect_timeout: float = 10.0,
        read_timeout: float = 60.0,
        try_timeout: float = 60.0,
        max_bytes: int = MAX_IMAGE_BYTES,
        ssl_context: ssl.SSLContext | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._reach = reach
        self._timeouts = {"connect": connect_timeout, "read": read_timeout, "write": connect_timeout}
        self._try_timeout = try_timeout
        self._max_bytes = max_bytes
        self._clock = clock or Clock()
        self._deadline = Deadline(self._clock)
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(),
            max_connections=None,
            network_backend=CheckedBackend(reach, self._deadline),
        )

    def close(self) -> None:
        """Close what is open."""
        with quiet():
            self._pool.close()

    def fetch(
        self, url: SecretStr, name: str = "image", *, patience: float = PATIENCE, stop: Stop | None = None
    ) -> tuple[Spool, ImageFacts]:
        """Return the image behind `url`, which the log calls `name`.

        Args:
            patience: seconds within which another try may begin; what no try could change ends it at once.
            stop: ends the wait for another try, where the URL is kept elsewhere; an image in hand is money.

        Raises:
            DownloadError: it could not be fetched. Its `status_code` is the image host's, its `attempts` are
                the tries to fetch.
        """
        started, partial = self._clock.monotonic(), _Partial()
        over = started + patience
        tries, pauses, stop = 0, backoff(*PAUSES), stop or Stop()
        while True:
            tries += 1
            self._deadline.at = max(over, self._clock.monotonic() + self._try_timeout)
            result = self._try(url, partial)
            if isinstance(result, ImageFacts):
                return partial.spool, result
            log.warning("%s: download %d failed: %s", name, tries, result)
            pause = next(pauses)
            wait = max(pause / 2 + self._clock.jitter(pause / 2), result.wait)
            if result.final or self._clock.monotonic() + wait >= over:
                break
            try:
                self._clock.sleep(wait, stop)
            except StopSending:
                break
        raise DownloadError(
            f"the image could not be fetched (tries: {tries}): {result}; its request is paid and not repeated",
            status_code=result.status,
            attempts=tries,
            elapsed=self._clock.monotonic() - started,
        )

    def _try(self, url: SecretStr, partial: _Partial) -> ImageFacts | Problem:
        try:
            with quiet():
                self._follow(url, partial)
            return read_image(partial.spool)
        except Problem as problem:
            return problem
        except (httpx.InvalidURL, UnicodeError):
            return Problem("its URL, or one it redirects to, is none", final=True)
        except (DecodingError, NotAnImage) as error:
            partial.restart()
            return Problem(str(error))
        except tuple(_BREAKS) as error:
            return Problem(next(what for kind, what in _BREAKS.items() if isinstance(error, kind)))

    def _follow(self, url: SecretStr, partial: _Partial) -> None:
        target = httpx.URL(url.get_secret_value())
        for _ in range(1 + MAX_REDIRECTS):
            usable = target.scheme in self._reach.schemes and target.host and (target.port or 0) < 65_536
            if not usable:
                raise Problem(f"its URL, or one it redirects to, is not {self._reach.schemes[0]}", final=True)
            sent = {
                "Host": target.netloc.decode("ascii"),
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "prefect-ttapi",
                **ONCE,
                **partial.headers,
            }
            extensions = {"timeout": self._timeouts}
            with self._pool.stream(
                "GET", str(target), headers=list(sent.items()), extensions=extensions
            ) as response:
                headers = httpx.Headers(response.headers)
                if response.status not in _REDIRECTS or "location" not in headers:
                    self._keep(response, headers, partial)
                    return
                target = target.join(headers["location"])
        raise Problem(f"more than {MAX_REDIRECTS} redirects", final=True)

    def _keep(self, response: httpcore.Response, headers: Mapping[str, str], partial: _Partial) -> None:
        self._expect(response.status, headers, partial)
        encoding = headers.get("content-encoding", "")
        if response.status == 200:
            partial.restart()
            etag = headers.get("etag", "")
            partial.etag = etag if etag.startswith('"') and not encoding else ""
        self._check_size(partial.spool.size_bytes + int(headers.get("content-length", 0)))
        for piece in decoded(response.iter_stream(), encoding):
            partial.spool.write(piece)
            self._check_size(partial.spool.size_bytes)
            if self._deadline.left() < 0:
                raise Problem("it took too long", final=True)

    def _expect(self, status: int, headers: Mapping[str, str], partial: _Partial) -> None:
        if status == 206 and partial.resumes:
            found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if found is not None and int(found[1]) == partial.spool.size_bytes:
                return
        elif status == 200:
            return
        if status in (206, 416):  # the rest that was asked for does not fit
            partial.restart()
        wait = min(read_retry_after(headers, self._clock.now()) or 0.0, _LONGEST_WAIT)
        raise Problem(f"the image's host answered HTTP {status}", status=status, wait=wait)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise Problem(f"it is larger than {self._max_bytes:,} bytes", final=True)
