from __future__ import annotations

import pytest

from prefect_ttapi.storage.store import ImageStore
from tests.support.ledgers import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all leases, which the test moves."""
    return Clock(monkeypatch)


@pytest.fixture
def store(each_store: ImageStore) -> ImageStore:
    """The test runs on each kind of store."""
    return each_store
