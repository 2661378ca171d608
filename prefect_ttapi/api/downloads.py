"""Fetching image URLs without trusting them.

A URL in an answer is a stranger's: it gets no key, no cookies, no proxy and no redirect that was not
checked. Every URL was paid for, so fetching it is tried again for a while, also after 403 and 404: CDNs lag.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import httpcore
import httpx
from pydantic import SecretStr

from prefect_ttapi.api.addresses import PUBLIC, AddressRefused, CheckedBackend, Deadline, Reach
from prefect_ttapi.api.json_stream import DecodingError
from prefect_ttapi.api.limiter import Clock
from prefect_ttapi.api.outcomes import read_retry_after
from prefect_ttapi.api.redaction import quiet
from prefect_ttapi.api.transport import decoded
from prefect_ttapi.errors import DownloadError
from prefect_ttapi.images.headers import ImageFacts, NotAnImage, read_image
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.stopping import Stop

log: Final = logging.getLogger(__name__)

MAX_REDIRECTS: Final = 5
MAX_IMAGE_BYTES: Final = 128 * 1024**2

#: Seconds before the second, third, ... try: each wait is between half of it and all of it.
DELAYS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT: Final = 30.0  # seconds, that an image host may ask for

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,15})-[0-9]{1,15}/(?:[0-9]{1,15}|\*)", re.ASCII)

_BREAKS: Final[Mapping[type[Exception], str]] = {
    httpcore.ConnectError: "no connection",
    httpcore.TimeoutException: "it took too long",
    httpcore.ProtocolError: "the answer broke off, or is no HTTP",
    httpcore.NetworkError: "the connection broke",
    OSError: "the image could not be kept in a temporary file",
}


class _Problem(Exception):  # noqa: N818 - raised and caught in this module only
    """Why a try failed; `final` where another would fail as well."""

    def __init__(
        self, what: str, *, final: bool = False, status: int | None = None, wait: float | None = None
    ) -> None:
        super().__init__(what)
        self.final = final
        self.status = status
        self.wait = wait or 0.0


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
        total_timeout: seconds for one image, all tries and redirects together.
        max_bytes: the largest image.
    """

    def __init__(
        self,
        *,
        reach: Reach = PUBLIC,
        connect_timeout: float = 10.0,
        read_timeout: float = 60.0,
        total_timeout: float = 300.0,
        max_bytes: int = MAX_IMAGE_BYTES,
        ssl_context: ssl.SSLContext | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._reach = reach
        self._timeouts = {"connect": connect_timeout, "read": read_timeout, "write": connect_timeout}
        self._total_timeout = total_timeout
        self._max_bytes = max_bytes
        self._clock = clock or Clock()
        self._deadline = Deadline(self._clock)
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(),
            max_connections=None,
            keepalive_expiry=2.0,
            network_backend=CheckedBackend(reach, self._deadline),
        )

    def close(self) -> None:
        """Close idle connections."""
        with quiet():
            self._pool.close()

    def fetch(self, url: SecretStr, name: str = "image") -> tuple[Spool, ImageFacts]:
        """Return the image behind `url`, which the log calls `name`.

        Raises:
            DownloadError: it could not be fetched. Its `status_code` is the image host's, its `attempts` are
                the tries to fetch.
        """
        started = self._clock.monotonic()
        self._deadline.at = started + self._total_timeout
        partial = _Partial()
        tries, delays = 0, iter(DELAYS)
        while True:
            tries += 1
            result = self._try(url, partial)
            if isinstance(result, ImageFacts):
                return partial.spool, result
            log.warning("%s: download %d failed: %s", name, tries, result)
            elapsed = self._clock.monotonic() - started
            delay = next(delays, None)
            if delay is None or result.final:
                break
            wait = max(delay / 2 + self._clock.jitter(delay / 2), result.wait)
            if elapsed + wait >= self._total_timeout:
                break
            self._clock.sleep(wait, Stop())  # an image in hand is money: nothing stops this
        raise DownloadError(
            f"the image could not be fetched (tries: {tries}): {result}; its request is paid and not repeated",
            status_code=result.status,
            attempts=tries,
            elapsed=elapsed,
        )

    def _try(self, url: SecretStr, partial: _Partial) -> ImageFacts | _Problem:
        try:
            with quiet():
                self._follow(url, partial)
            return read_image(partial.spool)
        except _Problem as problem:
            return problem
        except AddressRefused:
            return _Problem("its address is not on the public internet", final=True)
        except (httpx.InvalidURL, UnicodeError):
            return _Problem("its URL, or one it redirects to, is none", final=True)
        except (DecodingError, NotAnImage) as error:
            partial.restart()
            return _Problem(str(error))
        except tuple(_BREAKS) as error:
            return _Problem(next(what for kind, what in _BREAKS.items() if isinstance(error, kind)))

    def _follow(self, url: SecretStr, partial: _Partial) -> None:
        target = httpx.URL(url.get_secret_value())
        for _ in range(1 + MAX_REDIRECTS):
            usable = target.scheme in self._reach.schemes and target.host and (target.port or 0) < 65_536
            if not usable:
                raise _Problem(
                    f"its URL, or one it redirects to, is not {self._reach.schemes[0]}", final=True
                )
            sent = {
                "Host": target.netloc.decode("ascii"),
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "prefect-ttapi",
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
        raise _Problem(f"more than {MAX_REDIRECTS} redirects", final=True)

    def _keep(self, response: httpcore.Response, headers: Mapping[str, str], partial: _Partial) -> None:
        self._expect(response.status, headers, partial)
        encoding = headers.get("content-encoding", "")
        if response.status == 200:
            partial.restart()
            etag = headers.get("etag", "")
            partial.etag = etag if etag.startswith('"') and not encoding else ""
        if partial.spool.size_bytes + int(headers.get("content-length", 0)) > self._max_bytes:
            raise self._too_large()
        for piece in decoded(response.iter_stream(), encoding):
            partial.spool.write(piece)
            if partial.spool.size_bytes > self._max_bytes:
                raise self._too_large()
            if self._deadline.left() < 0:
                raise _Problem("it took too long", final=True)

    def _expect(self, status: int, headers: Mapping[str, str], partial: _Partial) -> None:
        if status == 206 and partial.resumes:
            found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if found is not None and int(found[1]) == partial.spool.size_bytes:
                return
        elif status == 200:
            return
        if status in (206, 416):  # the rest that was asked for does not fit
            partial.restart()
        asked = read_retry_after(headers, self._clock.now())
        wait = min(asked, _LONGEST_WAIT) if asked is not None else None
        raise _Problem(f"the image's host answered HTTP {status}", status=status, wait=wait)

    def _too_large(self) -> _Problem:
        return _Problem(f"it is larger than {self._max_bytes:,} bytes", final=True)
