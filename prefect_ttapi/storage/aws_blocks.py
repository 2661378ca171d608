"""Credentials from the blocks of prefect-aws, `AwsCredentials` and `MinIOCredentials`, where it is installed.

It is never imported here. What counts as such a block is what both of them have.
"""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Protocol, runtime_checkable

from botocore.exceptions import BotoCoreError, ClientError
from prefect.blocks.core import Block, BlockNotSavedError

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.s3 import Account, Keys
from prefect_ttapi.storage.s3_errors import explain

_NAMED: Final = re.compile(r"[a-z0-9-]+/[^/\s]+")


@runtime_checkable
class AwsBlock(Protocol):
    """The part of such a block that is used."""

    region_name: str | None
    aws_client_parameters: Any

    def __hash__(self) -> int: ...

    def get_boto3_session(self) -> Any: ...


def checked_block(given: object) -> str | AwsBlock | None:
    """Return the name of a saved block, or the block itself where it is not saved.

    Raises:
        ValueError: `given` is neither a block of prefect-aws nor the name of one.
    """
    if given is None or given == "":
        return None
    if isinstance(given, AwsBlock):
        return _name_of(given) or given
    if isinstance(given, str) and _NAMED.fullmatch(given):
        return given
    raise ValueError(
        "is neither a block of prefect-aws nor the name of one: give aws-credentials/NAME, "
        "minio-credentials/NAME, or the block itself"
    )


def shown(block: str | AwsBlock | None, *, saving: bool) -> str | None:
    """Return how a block is named where its store is saved or shown.

    Raises:
        ValueError: the store is saved, and the block is not.
    """
    if block is None or isinstance(block, str):
        return block
    if saving:
        raise ValueError(f"save the {type(block).__name__} block first: a store keeps its name")
    return f"{type(block).__name__} (not saved)"


def with_block(account: Account, block: str | AwsBlock | None) -> Account:
    """Return the account, with what it lacks from its block of prefect-aws.

    Raises:
        StoreError: there is no such block.
    """
    if block is None:
        return account
    loaded = _loaded(block)
    parameters = loaded.aws_client_parameters
    verify = parameters.verify_cert_path or parameters.verify
    return replace(
        account,
        endpoint_url=account.endpoint_url or parameters.endpoint_url,
        region=account.region or loaded.region_name,
        verify=account.verify if account.verify is not True or verify is None else _as_botocore(verify),
        find_keys=_KeysOf(block),
    )


@dataclass(frozen=True)
class _KeysOf:
    """Credentials as the block gives them now, which for an assumed role are new ones each time."""

    block: str | AwsBlock

    def __call__(self) -> Keys:
        try:
            found = _fetched(self.block).get_boto3_session().get_credentials()
        except (BotoCoreError, ClientError, OSError) as error:
            raise explain(error, "can't get credentials from aws_credentials") from error
        if found is None:
            raise StoreError("can't get credentials from aws_credentials: the block has none")
        frozen = found.get_frozen_credentials()
        return frozen.access_key, frozen.secret_key, frozen.token


@lru_cache(maxsize=32)
def _loaded(block: str | AwsBlock) -> AwsBlock:
    """Return the block, fetched from the Prefect server where only its name is known; once in a process."""
    return _fetched(block)


def _fetched(block: str | AwsBlock) -> AwsBlock:
    if not isinstance(block, str):
        return block
    try:
        # in a thread of its own, since an event loop may be running in this one
        with ThreadPoolExecutor(1) as thread:
            found: object = thread.submit(copy_context().run, asyncio.run, Block.aload(block)).result()
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise StoreError(f"can't load the block {block}: {why}; is prefect-aws installed?") from error
    if not isinstance(found, AwsBlock):
        raise StoreError(f"the block {block} has no AWS credentials: name an aws-credentials block")
    return found


def _name_of(block: AwsBlock) -> str | None:
    """Return the name that the block is saved under, None where it is not."""
    if not isinstance(block, Block):
        return None
    try:
        saved = block.get_block_placeholder()
    except BlockNotSavedError:
        return None
    return saved.removeprefix("prefect.blocks.").replace(".", "/", 1)


def _as_botocore(verify: object) -> bool | str:
    return verify if isinstance(verify, bool) else str(verify)
