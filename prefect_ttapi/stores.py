"""Stores as a command line names them."""

from __future__ import annotations

from typing import Any, cast

from pydantic import ValidationError

from prefect_ttapi.storage.store import ImageStore


def store_at(address: str, endpoint_url: str | None = None) -> ImageStore:
    """The store at a folder or `s3://bucket/prefix`, or the saved block `block:NAME`.

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
        # Prefect adds _sync to what may also be awaited
        store: ImageStore = cast(Any, ImageStore.load)(name, _sync=True)
        return store.model_copy(update={"endpoint_url": endpoint_url}) if endpoint_url else store
    except ValidationError as error:
        raise ValueError("; ".join(problem["msg"] for problem in error.errors(include_input=False))) from None
