"""Credentials from the blocks of prefect-aws, `AwsCredentials` and `MinIOCredentials`, where it is installed.

It is never imported here. What counts as such a block is what both of them have.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final, Protocol, cast, runtime_checkable

from botocore.exceptions import BotoCoreError, ClientError
from prefect.blocks.core import Block

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.s3_errors import explain

_NAMED: Final = re.compile(r"[a-z0-9-]+/[^/\s]+")


@runtime_checkable
class AwsBlock(Protocol):
    """What is used of such a block."""

    region_name: str | None
    aws_client_parameters: Any

    def __hash__(self) -> int: ...

    def get_boto3_session(self) -> Any: ...


#: Key ID, secret and session token.
Keys = tuple[str | None, str | None, str | None]


def checked_block(given: object) -> str | AwsBlock | None:
    """`given`, if it is such a block or may be the name of a saved one. ValueError: it is neither."""
    if given is None or given == "" or isinstance(given, AwsBlock):
        return given or None
    if isinstance(given, str) and _NAMED.fullmatch(given):
        return given
    raise ValueError(
        "is neither a block of prefect-aws nor the name of one: give aws-credentials/NAME, "
        "minio-credentials/NAME, or the block itself"
    )


def named(block: object, *, saving: bool) -> object:
    """What is kept of such a block where its store is saved or shown: its name. ValueError: it has none."""
    if not isinstance(block, Block):
        return block
    if block._block_document_name:
        return f"{block.get_block_type_slug()}/{block._block_document_name}"
    if saving:
        raise ValueError(f"save the {type(block).__name__} block first: a store keeps its name")
    return f"{type(block).__name__} (not saved)"


@lru_cache(maxsize=32)
def loaded(block: str | AwsBlock) -> AwsBlock:
    """The block, fetched from the Prefect server where only its name is known; once in a process."""
    return _fetched(block)


def keys_of(block: str | AwsBlock) -> Keys:
    """Credentials as the block gives them now, which for an assumed role are new ones each time.

    Raises:
        StoreError: there is no such block, or it has no credentials to give.
    """
    try:
        found = _fetched(block).get_boto3_session().get_credentials()
    except (BotoCoreError, ClientError, OSError) as error:
        raise explain(error, "can't get credentials from aws_credentials") from error
    if found is None:
        raise StoreError("can't get credentials from aws_credentials: the block has none")
    frozen = found.get_frozen_credentials()
    return frozen.access_key, frozen.secret_key, frozen.token


def _fetched(block: str | AwsBlock) -> AwsBlock:
    if not isinstance(block, str):
        return block
    try:
        found = cast(Any, Block.load)(block, _sync=True)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise StoreError(f"can't load the block {block}: {why}; is prefect-aws installed?") from error
    if not isinstance(found, AwsBlock):
        raise StoreError(f"the block {block} has no AWS credentials: name an aws-credentials block")
    return found
