"""Which store an address is in, and what kind of thing it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from prefect_ttapi.storage.addresses import bucket_and_prefix, normalised
from prefect_ttapi.storage.objects import SIDECARS
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.stores import store_at

#: Where a store's own objects are, below its root.
IMAGE: Final = re.compile(r"(?P<root>.+)/images/(?P<sha256>[0-9a-f]{64})\.[a-z]+")
RECORD: Final = re.compile(r"(?P<root>.+)/ledger/(?P<folder>[^/]+)/(?P<request_hash>[0-9a-f]{64})\.json")
RUN: Final = re.compile(r"(?P<root>.+)/batches/(?P<run>[A-Za-z0-9][A-Za-z0-9_-]*)(/.*)?")

#: What a run may be called.
RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def uri_of(address: str) -> str:
    """An address with its scheme: `s3://bucket/key`, or `file:///...` for a path of this machine.

    >>> uri_of("/srv/out/a b.png"), uri_of("s3://pictures/a.png")
    ('file:///srv/out/a%20b.png', 's3://pictures/a.png')

    Raises:
        ValueError: that is no address.
    """
    if address.startswith("s3://"):
        if not address.removeprefix("s3://").strip("/").partition("/")[2]:
            raise ValueError(f"{address!r} names a bucket and no object in it")
        return address
    return Path(normalised(address)).as_uri()


def object_at(uri: str, endpoint_url: str | None) -> tuple[ImageStore, str]:
    """A store through which the object of this address can be read, and its key there."""
    if uri.startswith("s3://"):
        bucket, key = bucket_and_prefix(uri)
        return store_at(f"s3://{bucket}", endpoint_url), key
    path = Path(normalised(uri))
    key_by_root = {root: path.relative_to(root) for root in path.parents}
    described = (root for root, key in key_by_root.items() if (root / SIDECARS / f"{key}.json").is_file())
    root = next(described, path.parent)
    return ImageStore(url=str(root)), key_by_root[root].as_posix()


def store_at_root(root: str, endpoint_url: str | None) -> ImageStore:
    """The store whose own objects are below `root`."""
    return store_at(root, endpoint_url)
