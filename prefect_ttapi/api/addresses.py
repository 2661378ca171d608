"""Connecting where a stranger's URL may lead, and for no longer than there is time.

The address is checked when it is connected to. A name is resolved once, and the connection goes to the very address
that was checked: a name that first shows a public address and then a private one (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import urlsplit

import httpcore

from prefect_ttapi.api.limiter import Clock
from prefect_ttapi.origins import is_loopback

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


class AddressRefused(Exception):  # noqa: N818 - it is about the address, not about us
    """A name leads to no address that may be connected to."""


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
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """Return the encrypted connection, with the same bound."""
        return BoundedStream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows about itself."""
        return self._stream.get_extra_info(info)


class CheckedBackend(httpcore.NetworkBackend):
    """Opens connections to the addresses that `reach` allows, and to no others.

    Host header, SNI and certificate checks keep the name: httpcore takes them from the URL.
    """

    def __init__(self, reach: Reach, deadline: Deadline) -> None:
        self._reach = reach
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()

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
            AddressRefused: `host` has no allowed address.
            httpcore.ConnectError, httpcore.ConnectTimeout: no allowed address could be reached.
        """
        try:
            found = self._reach.resolve(host)
        except (OSError, UnicodeError):
            raise httpcore.ConnectError("the name could not be resolved") from None
        allowed = [address for address in found if self._is_allowed(address)]
        failure: Exception = AddressRefused()
        for address in allowed[:_MOST_TRIED]:
            try:
                stream = self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
                return BoundedStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def _is_allowed(self, address: str) -> bool:
        try:
            return self._reach.allows(ipaddress.ip_address(address))
        except ValueError:
            return False
