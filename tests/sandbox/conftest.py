"""One sandbox for all tests that only ask it something; counts start from zero in each."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import pytest

from prefect_ttapi.sandbox import Sandbox

Connect = Callable[..., httpx.Client]


@pytest.fixture(scope="package")
def connect() -> Connect:
    """Makes clients, given a base_url; they share a TLS context, which takes 40 ms to make."""
    return partial(
        httpx.Client, headers={"TT-API-KEY": "any"}, timeout=30, verify=ssl.create_default_context()
    )


@pytest.fixture(scope="package")
def _shared() -> Iterator[Sandbox]:
    with Sandbox(tiny=True) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(_shared: Sandbox) -> Sandbox:
    _shared.reset()
    return _shared


@pytest.fixture
def client(sandbox: Sandbox, connect: Connect) -> Iterator[httpx.Client]:
    with connect(base_url=sandbox.base_url) as client:
        yield client
