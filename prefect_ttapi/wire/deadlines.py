"""A bound on the whole of an exchange: a timeout for each byte lets a drip of bytes go on for ever."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from typing import Any

import httpcore


class BoundedStream(httpcore.NetworkStream):
    """A connection on which no read or write waits for longer than is left.

    Args:
        left: the seconds that the thread's present exchange still has.
    """

    def __init__(self, stream: httpcore.NetworkStream, left: Callable[[], float]) -> None:
        self._stream = stream
        self._left = left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """As it is.

        Raises:
            httpcore.ReadTimeout: nothing came in time, or no time is left.
        """
        left = self._left()
        if left <= 0:
            raise httpcore.ReadTimeout("no time is left")
        return self._stream.read(max_bytes, left if timeout is None else min(timeout, left))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """As it is: requests for images are a few lines, which no connection holds up."""
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        """As it is."""
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """The same bound on the encrypted connection."""
        return BoundedStream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._left)

    def get_extra_info(self, info: str) -> Any:
        """As it is."""
        return self._stream.get_extra_info(info)


class BoundedBackend(httpcore.NetworkBackend):
    """Opens connections as `backend` does, with the bound."""

    def __init__(self, backend: httpcore.NetworkBackend, left: Callable[[], float]) -> None:
        self._backend = backend
        self._left = left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection; raises what `backend` does."""
        stream = self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return BoundedStream(stream, self._left)
