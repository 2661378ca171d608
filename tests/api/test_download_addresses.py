"""Where a stranger's URL may lead."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterator

import httpcore
import pytest

from prefect_ttapi.api.downloads import (
    ANYWHERE,
    PUBLIC,
    Address,
    CheckedBackend,
    Deadline,
    Problem,
    Reach,
    is_public,
    reach_from,
)
from prefect_ttapi.api.limiter import Clock

PUBLIC_ONES = [
    "8.8.8.8",
    "1.1.1.1",
    "172.15.255.255",
    "172.32.0.1",
    "193.0.0.1",
    "2606:4700::1111",
    "2a00:1450::1",
]
OTHERS = [
    "0.0.0.0",  # noqa: S104
    "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.255", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.1", "192.0.0.170", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "168.63.129.16",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::808:808", "64:ff9b:1::a00:1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:db8::1",
    "2002:7f00:1::", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1",
    "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC_ONES)
def test_hosts_on_the_internet_are_public(address: str) -> None:
    """Ordinary addresses may be fetched from."""
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OTHERS)
def test_everything_else_is_not(address: str) -> None:
    """Private, local, reserved, multicast, documentation, and whatever carries an IPv4 address inside."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("base_url", "reach"),
    [
        ("https://api.ttapi.io", PUBLIC),
        ("https://8.8.8.8/x", PUBLIC),
        ("http://localhost:1234", ANYWHERE),
        ("http://127.0.0.1:1234/sandbox", ANYWHERE),
        ("https://[::1]:1", ANYWHERE),
        ("https://10.0.0.7", ANYWHERE),
        ("https://[::ffff:127.0.0.1]", ANYWHERE),
        ("https://[::ffff:8.8.8.8]", ANYWHERE),
    ],
)
def test_only_an_api_that_is_not_public_has_images_that_are_not(base_url: str, reach: object) -> None:
    """The sandbox's images may be on this machine; the vendor's never."""
    assert reach_from(base_url) is reach


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


class Names(Reach):
    """Resolves every name to one answer after the other, and allows public addresses, or those given.

    Attributes:
        asked: the names that were resolved.
        tried: the addresses that were checked.
    """

    def __init__(self, *answers: list[str], allowed: Collection[str] | None = None) -> None:
        self.asked: list[str] = []
        self.tried: list[str] = []
        self._answers = answers
        self._allowed = allowed

    def allows(self, address: Address) -> bool:
        self.tried.append(str(address))
        return is_public(address) if self._allowed is None else str(address) in self._allowed

    def resolve(self, host: str) -> list[str]:
        self.asked.append(host)
        return self._answers[min(len(self.asked), len(self._answers)) - 1]


def backend(reach: Reach) -> CheckedBackend:
    deadline = Deadline(Clock())
    deadline.at = Clock().monotonic() + 60
    return CheckedBackend(reach, deadline)


@pytest.mark.parametrize("address", [*OTHERS, "no address"])
def test_a_name_that_leads_elsewhere_is_refused(address: str) -> None:
    """The check is made on what the name resolves to, before anything is connected to."""
    with pytest.raises(Problem):
        backend(Names([address])).connect_tcp("innocent.example", 443, timeout=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "::1", "0"])
def test_every_way_to_write_this_machine_is_refused(host: str) -> None:
    """Numbers, short forms and names: the resolver's answer counts, not how it was written."""
    with pytest.raises((Problem, httpcore.ConnectError)):
        backend(PUBLIC).connect_tcp(host, 443, timeout=1)


def test_the_checked_address_is_the_one_connected_to(listener: socket.socket) -> None:
    """A name is resolved once: what it shows a second time (DNS rebinding) is never asked for."""
    port = listener.getsockname()[1]
    names = Names(["127.0.0.1"], ["127.0.0.9"], allowed=["127.0.0.1"])
    checked = backend(names)
    stream = checked.connect_tcp("images.example", port, timeout=5)
    assert stream.get_extra_info("server_addr") == ("127.0.0.1", port)
    stream.close()
    assert names.asked == ["images.example"]
    with pytest.raises(Problem):
        checked.connect_tcp("images.example", port, timeout=5)


def test_forbidden_addresses_are_passed_over(listener: socket.socket) -> None:
    """Of several addresses only allowed ones are tried, the next one where one does not answer."""
    port = listener.getsockname()[1]
    names = Names(["127.0.0.9", "127.0.0.2", "127.0.0.1"], allowed=["127.0.0.2", "127.0.0.1"])
    stream = backend(names).connect_tcp("images.example", port, timeout=5)
    assert stream.get_extra_info("server_addr") == ("127.0.0.1", port)
    stream.close()
    assert names.tried == ["127.0.0.9", "127.0.0.2", "127.0.0.1"]


def test_names_that_do_not_resolve() -> None:
    """An unknown or impossible name is a failed connection, which is tried again."""

    class Unknown(Reach):
        def resolve(self, host: str) -> list[str]:
            raise socket.gaierror(-2, f"{host}: name or service not known")

    with pytest.raises(httpcore.ConnectError, match="could not be resolved"):
        backend(Unknown()).connect_tcp("nowhere.example", 443)
    with pytest.raises(httpcore.ConnectError, match="could not be resolved"):
        backend(PUBLIC).connect_tcp("a" * 70 + ".example", 443)
