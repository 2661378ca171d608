"""Whom a download may be fetched from: certificates, redirects, private networks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefect_ttapi.api.downloads import Address, Downloader, Reach
from tests.support.clocks import StoppedClock
from tests.support.downloading import IMAGE, WAITS, fetch, redirect, refused
from tests.support.hostile import (
    HostileServer,
    answer,
)
from tests.support.tls import Identity, identity

FIRST = 1 + len(WAITS)

NAME = "images.example"


@pytest.fixture(scope="module")
def tls() -> Identity:
    return identity(NAME)


@pytest.fixture(scope="module")
def secure(tls: Identity) -> Iterator[HostileServer]:
    with HostileServer(tls=tls.server) as running:
        yield running


def only(allowed: str, tls: Identity, stopped: StoppedClock, names: dict[str, str]) -> Downloader:
    """A downloader for https that may reach one address only; names resolve as given."""

    class Only(Reach):
        def allows(self, address: Address) -> bool:
            return str(address) == allowed

        def resolve(self, host: str) -> list[str]:
            return [names[host]]

    return Downloader(reach=Only(), ssl_context=tls.client, clock=stopped)


def test_name_and_certificate_stay_those_of_the_url(
    secure: HostileServer, tls: Identity, stopped: StoppedClock
) -> None:
    """The connection goes to the checked address, while SNI, Host and the certificate's name are the URL's."""
    downloader = only("127.0.0.1", tls, stopped, {NAME: "127.0.0.1", "other.example": "127.0.0.1"})
    tls.asked_for.clear()
    secure.play(answer(200, IMAGE))
    assert fetch(downloader, f"https://{NAME}:{secure.port}/x")[0].read_bytes() == IMAGE
    assert (tls.asked_for, secure.requests[0].headers["host"]) == ([NAME], f"{NAME}:{secure.port}")
    secure.play(answer(200, IMAGE))
    assert refused(downloader, f"https://other.example:{secure.port}/x", "no connection").attempts == FIRST
    assert secure.requests == []
    downloader.close()


@pytest.mark.parametrize("target", ["https://inside.example:{port}/x", "https://127.0.0.2:{port}/x"])
def test_a_redirect_to_an_address_that_is_not_allowed(
    secure: HostileServer, tls: Identity, stopped: StoppedClock, target: str
) -> None:
    """Each hop is checked like the first: a public host can't send us into a private network."""
    names = {NAME: "127.0.0.1", "inside.example": "127.0.0.2", "127.0.0.2": "127.0.0.2"}
    downloader = only("127.0.0.1", tls, stopped, names)
    secure.play(redirect(target.format(port=secure.port)))
    assert refused(downloader, f"https://{NAME}:{secure.port}/x", "not on the public internet").attempts == 1
    assert len(secure.requests) == 1
    downloader.close()


def test_https_never_turns_into_http(
    server: HostileServer, secure: HostileServer, tls: Identity, stopped: StoppedClock
) -> None:
    """Neither a URL nor a redirect may leave https."""
    downloader = only("127.0.0.1", tls, stopped, {NAME: "127.0.0.1"})
    server.play(answer(200, IMAGE))
    secure.play(redirect(f"http://{NAME}:{server.port}/x"))
    refused(downloader, f"https://{NAME}:{secure.port}/x", "not https")
    refused(downloader, f"http://{NAME}:{server.port}/x", "not https")
    assert server.requests == []
    downloader.close()


def test_by_default_only_the_internet_is_reached(server: HostileServer) -> None:
    """Without being told otherwise, a download goes nowhere near this machine."""
    server.play(answer(200, IMAGE))
    downloader = Downloader()
    refused(downloader, f"https://127.0.0.1:{server.port}/x", "not on the public internet")
    refused(downloader, f"{server.url}/x", "not https")
    assert server.requests == []
    downloader.close()
