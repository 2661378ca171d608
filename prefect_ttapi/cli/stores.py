"""Stores and objects as a command line names them."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from pydantic import ValidationError

from prefect_ttapi.storage.layout import bucket_and_prefix, is_s3, normalised, s3_uri, sidecar_key
from prefect_ttapi.storage.store import ImageStore


def store_at(address: str, endpoint_url: str | None = None) -> ImageStore:
    """Return the store at a folder or `s3://bucket/prefix`, or the saved block `block:NAME`.

    Args:
        endpoint_url: of an S3 service other than AWS, in place of the block's or the environment's.

    Raises:
        ValueError: that is no address, or there is no such block.

    >>> store_at("s3://pictures/2031", "https://minio.example.com").identity
    's3://pictures/2031 at https://minio.example.com'
    """
    kind, _, name = address.partition(":")
    try:
        if kind != "block":
            return ImageStore(url=address, endpoint_url=endpoint_url)
        store = cast(ImageStore, ImageStore.load(name))  # which could also be awaited, where a loop runs
        return store.model_copy(update={"endpoint_url": endpoint_url}) if endpoint_url else store
    except ValidationError as error:
        raise ValueError("; ".join(problem["msg"] for problem in error.errors(include_input=False))) from None


def object_at(uri: str, endpoint_url: str | None) -> tuple[ImageStore, str]:
    """Return a store through which the object of this address can be read, and its key there."""
    if is_s3(uri):
        bucket, key = bucket_and_prefix(uri)
        return store_at(s3_uri(bucket), endpoint_url), key
    path = Path(normalised(uri))
    key_by_root = {root: path.relative_to(root).as_posix() for root in path.parents}
    described = (root for root, key in key_by_root.items() if (root / sidecar_key(key)).is_file())
    root = next(described, path.parent)
    return ImageStore(url=str(root)), key_by_root[root]
