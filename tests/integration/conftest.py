from __future__ import annotations

import pytest

from prefect_ttapi.storage.store import ImageStore
from tests.ceph import CephServer, ceph  # noqa: F401 - a fixture


@pytest.fixture
def ceph_store(ceph: CephServer) -> ImageStore:  # noqa: F811
    """A store below a prefix of a new bucket of Ceph's."""
    return ImageStore(url=f"s3://{ceph.new_bucket()}/some/prefix", **ceph.settings())
