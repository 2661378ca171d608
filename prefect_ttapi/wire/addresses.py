"""Connecting only where a stranger's URL may lead: the address is checked when it is connected to.

A name is resolved once, and the connection goes to the very address that was checked: a name that first
shows a public address and then a private one (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpcore

from prefect_ttapi.origins import is_loopback

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[..., list[Any]]

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
    """Whether `address` is a host on the internet.

    >>> [is_public(ipaddress.ip_address(text)) for text in ("8.8.8.8", "127.0.0.1", "::ffff:8.8.8.8")]
    [True, False, False]
    """
    return (
        address.is_global
        and not address.is_multicast
        and (address.version == 4 or address in _IPV6_UNICAST)
        and not any(address in network for network in _LEAD_ELSEWHERE)
    )


@dataclass(frozen=True)
class Reach:
    """Where downloads may go."""

    schemes: tuple[str, ...]
    allows: Callable[[Address], bool]


PUBLIC: Final = Reach(("https",), is_public)
ANYWHERE: Final = Reach(("https", "http"), lambda _address: True)


def reach_from(base_url: str) -> Reach:
    """Where images of an API at `base_url` may be: on the internet, unless the API itself is not.

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


class CheckedBackend(httpcore.NetworkBackend):
    """Opens connections to the addresses that `allows` accepts, and to no others.

    Host header, SNI and certificate checks keep the name: httpcore takes them from the URL.
    """

    def __init__(self, allows: Callable[[Address], bool], resolve: Resolve = socket.getaddrinfo) -> None:
        self._allows = allows
        self._resolve = resolve
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first allowed address of `host` that accepts it.

        Raises:
            AddressRefused: `host` has no allowed address.
            httpcore.ConnectError, httpcore.ConnectTimeout: no allowed address could be reached.
        """
        try:
            found = self._resolve(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise httpcore.ConnectError("the name could not be resolved") from None
        allowed = [address[0] for *_, address in found if self._is_allowed(address[0])]
        if not allowed:
            raise AddressRefused
        *others, last = allowed[:_MOST_TRIED]
        for address in others:
            try:
                return self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return self._backend.connect_tcp(last, port, timeout, local_address, socket_options)

    def _is_allowed(self, address: str) -> bool:
        try:
            return self._allows(ipaddress.ip_address(address))
        except ValueError:
            return False
