from __future__ import annotations

from pathlib import Path

import pytest

from prefect_ttapi.storage.store import ImageStore
from tests.support.ledgers import Clock
from tests.support.s3 import S3Server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all leases, which the test moves."""
    return Clock(monkeypatch)


@pytest.fixture
def folder_store(tmp_path: Path) -> ImageStore:
    """A store in a folder that does not exist yet."""
    return ImageStore(url=str(tmp_path / "store"))


@pytest.fixture
def s3_store(s3_server: S3Server) -> ImageStore:
    """A store below a prefix of a new bucket."""
    return ImageStore(url=f"s3://{s3_server.new_bucket()}/some/prefix", **s3_server.settings())


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest) -> ImageStore:
    """The test runs on each kind of store."""
    return request.getfixturevalue(f"{request.param}_store")
