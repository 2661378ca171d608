"""One hostile server and one client for a whole file of tests: what one test breaks must not harm the
next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from prefect_ttapi.api.client import TTAPIClient
from tests.support.clocks import StoppedClock
from tests.support.hostile import KEY, HostileServer


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running


@pytest.fixture(scope="module")
def stopped() -> StoppedClock:
    return StoppedClock()


@pytest.fixture(scope="module")
def make_client(server: HostileServer, stopped: StoppedClock) -> Iterator[Callable[..., TTAPIClient]]:
    """A client of the hostile server; the same options give the same client."""
    made: dict[str, TTAPIClient] = {}

    def make(**options: object) -> TTAPIClient:
        usual = {"base_url": server.url, "connect_timeout": 5, "read_timeout": 5, "clock": stopped}
        if repr(options) not in made:
            made[repr(options)] = TTAPIClient(KEY, **{**usual, **options})
        return made[repr(options)]

    yield make
    for client in made.values():
        client.close()


@pytest.fixture
def client(make_client: Callable[..., TTAPIClient], stopped: StoppedClock) -> TTAPIClient:
    stopped.sleeps.clear()
    return make_client()
