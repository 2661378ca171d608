from __future__ import annotations

import pytest

from prefect_ttapi.storage.store import ImageStore


@pytest.fixture
def store(each_store: ImageStore) -> ImageStore:
    """The test runs on each kind of store."""
    return each_store
