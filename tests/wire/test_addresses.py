"""Where a stranger's URL may lead."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

import httpcore
import pytest

from prefect_ttapi.wire.addresses import (
    ANYWHERE,
    PUBLIC,
    AddressRefused,
    CheckedBackend,
    is_public,
    reach_from,
)

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


def resolving(*answers: list[str]) -> tuple[list[str], object]:
    """A resolver that gives one answer after the other, and a list of the names it was asked for."""
    asked: list[str] = []

    def resolve(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    return asked, resolve


@pytest.mark.parametrize("address", [*OTHERS, "no address"])
def test_a_name_that_leads_elsewhere_is_refused(address: str) -> None:
    """The check is made on what the name resolves to, before anything is connected to."""
    _, resolve = resolving([address])
    with pytest.raises(AddressRefused):
        CheckedBackend(is_public, resolve).connect_tcp("innocent.example", 443, timeout=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "::1", "0"])
def test_every_way_to_write_this_machine_is_refused(host: str) -> None:
    """Numbers, short forms and names: the resolver's answer counts, not how it was written."""
    with pytest.raises((AddressRefused, httpcore.ConnectError)):
        CheckedBackend(is_public).connect_tcp(host, 443, timeout=1)


def test_the_checked_address_is_the_one_connected_to(listener: socket.socket) -> None:
    """A name is resolved once: what it shows a second time (DNS rebinding) is never asked for."""
    port = listener.getsockname()[1]
    asked, resolve = resolving(["127.0.0.1"], ["127.0.0.9"])
    backend = CheckedBackend(lambda address: str(address) == "127.0.0.1", resolve)
    stream = backend.connect_tcp("images.example", port, timeout=5)
    assert stream.get_extra_info("server_addr") == ("127.0.0.1", port)
    stream.close()
    assert asked == ["images.example"]
    with pytest.raises(AddressRefused):
        backend.connect_tcp("images.example", port, timeout=5)


def test_forbidden_addresses_are_passed_over(listener: socket.socket) -> None:
    """Of several addresses only allowed ones are tried, the next one where one does not answer."""
    port = listener.getsockname()[1]
    _, resolve = resolving(["127.0.0.9", "127.0.0.2", "127.0.0.1"])
    tried: list[str] = []

    def allows(address: object) -> bool:
        tried.append(str(address))
        return str(address) != "127.0.0.9"

    stream = CheckedBackend(allows, resolve).connect_tcp("images.example", port, timeout=5)
    assert stream.get_extra_info("server_addr") == ("127.0.0.1", port)
    stream.close()
    assert tried == ["127.0.0.9", "127.0.0.2", "127.0.0.1"]


def test_names_that_do_not_resolve() -> None:
    """An unknown or impossible name is a failed connection, which is tried again."""

    def resolve(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(httpcore.ConnectError, match="could not be resolved"):
        CheckedBackend(is_public, resolve).connect_tcp("nowhere.example", 443)
    with pytest.raises(httpcore.ConnectError, match="could not be resolved"):
        CheckedBackend(is_public).connect_tcp("a" * 70 + ".example", 443)
