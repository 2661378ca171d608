from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_ttapi.storage.store import ImageStore
from tests.support.ceph import CephServer, ceph  # noqa: F401 - a fixture
from tests.support.postgres import postgres
from tests.support.prefect_server import ROOT, Server, prefect_server


@pytest.fixture
def ceph_store(ceph: CephServer) -> ImageStore:  # noqa: F811
    """A store below a prefix of a new bucket of Ceph's."""
    return ImageStore(url=f"s3://{ceph.new_bucket()}/some/prefix", **ceph.settings())


@pytest.fixture(scope="session")
def prefect_ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real Prefect server with its UI, on Postgres, since a busy SQLite is "locked"; one for all tests."""
    home = tmp_path_factory.mktemp("prefect")
    with (
        postgres() as database,
        prefect_server(home, PREFECT_API_DATABASE_CONNECTION_URL=database) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where what a browser showed is kept for people to look at."""
    folder = ROOT / "out" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
