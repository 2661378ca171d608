"""Objects in an S3 bucket, through s3fs's client: one request per operation, judged by its HTTP status."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, TypeVar

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, ClientError

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.spool import Spool
from prefect_ttapi.storage.accounts import Account
from prefect_ttapi.storage.objects import (
    PATIENCE,
    Body,
    Condition,
    Facts,
    Found,
    Listed,
    NoAnswerError,
    ObjectStore,
    checked_key,
)
from prefect_ttapi.storage.s3_errors import explain, is_missing

Answer = TypeVar("Answer")

_CHUNK: Final = 256 * 1024

#: Where it is tried whether one may write.
_TRIED: Final = "write-test"

#: Enough for 100 requests in flight, their renewals and look-ups.
_CONNECTIONS: Final = 128

#: Seconds. Short of a claim's life, so that a renewal can be tried more than once.
_CONNECT_TIMEOUT: Final = 10
_READ_TIMEOUT: Final = 20

#: Seconds between attempts: doubled each time, up to the second figure.
_PAUSES: Final = (0.2, 5.0)


@dataclass(frozen=True)
class S3Settings:
    """Where in a bucket objects are, without slashes around the prefix."""

    bucket: str
    prefix: str
    account: Account


class S3:
    """The keys below `prefix` in a bucket; safe from all threads, not across a fork."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._base = f"{settings.prefix}/" if settings.prefix else ""
        self._fs = _connection(settings.account, os.getpid())

    def uri(self, key: str) -> str:
        return f"s3://{self.settings.bucket}/{self._name(key)}"

    def key(self, uri: str) -> str:
        base = f"s3://{self.settings.bucket}/{self._base}"
        if not uri.startswith(base):
            raise StoreError(f"{uri} is not in {base}")
        return checked_key(uri.removeprefix(base))

    def read(self, key: str) -> tuple[bytes, str] | None:
        async def attempt() -> tuple[bytes, str] | None:
            answer = await self._call_if_there("get_object", key)
            if answer is None:
                return None
            async with answer["Body"] as body:
                return await body.read(), _tag(answer)

        return self._run(self._patiently("can't read", key, attempt))

    def fetch(self, key: str) -> Body:
        async def attempt() -> Spool | None:
            spool = Spool()
            answer = await self._call_if_there("get_object", key)
            if answer is None:
                return None
            async with answer["Body"] as body:
                while chunk := await body.read(_CHUNK):
                    spool.write(chunk)
            return spool

        spool = self._run(self._patiently("can't read", key, attempt))
        if spool is None:
            raise ImageMissingError(f"there is no {self.uri(key)}")
        return spool.open

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        async def all_facts() -> list[dict[str, Any] | None]:
            return list(await asyncio.gather(*map(self._head, keys)))

        return [None if facts is None else int(facts["ContentLength"]) for facts in self._run(all_facts())]

    def digest(self, key: str) -> tuple[int, str] | None:
        async def attempt() -> tuple[int, str] | None:
            answer = await self._call_if_there("get_object", key)
            if answer is None:
                return None
            size, digest = 0, hashlib.sha256()
            async with answer["Body"] as body:
                while chunk := await body.read(_CHUNK):
                    size += len(chunk)
                    digest.update(chunk)
            return size, digest.hexdigest()

        return self._run(self._patiently("can't read", key, attempt))

    def look(self, key: str) -> Found | None:
        facts = self._run(self._head(key))
        return facts and Found(int(facts["ContentLength"]), facts.get("Metadata", {}), _tag(facts))

    async def _head(self, key: str) -> dict[str, Any] | None:
        return await self._patiently("can't look at", key, lambda: self._call_if_there("head_object", key))

    def write(
        self,
        key: str,
        body: Body,
        facts: Facts,
        expected: Condition | str = Condition.ANYTHING,
        patience: float = PATIENCE,
    ) -> str:
        arguments = self._at(key) | _described(facts) | _conditions(expected)

        async def attempt() -> str:
            with body() as stream:
                return _tag(await self._fs._call_s3("put_object", Body=stream, **arguments))

        once = expected is not Condition.ANYTHING
        return self._run(self._patiently("can't write", key, attempt, 0 if once else patience))

    def try_writing(self) -> None:
        async def attempt() -> None:
            # whoever may begin an upload may write; one that is given up leaves no object
            begun = await self._fs._call_s3("create_multipart_upload", **self._at(_TRIED))
            await self._fs._call_s3("abort_multipart_upload", **self._at(_TRIED), UploadId=begun["UploadId"])

        self._run(self._patiently("can't write", _TRIED, attempt))

    def copy(
        self, source: ObjectStore, source_key: str, key: str, facts: Facts, expected: Condition
    ) -> str | None:
        if not isinstance(source, S3) or source.settings.account != self.settings.account:
            return None
        arguments = self._at(key) | _described(facts) | _conditions(expected)

        async def attempt() -> str:
            try:
                answer = await self._fs._call_s3(
                    "copy_object", CopySource=source._at(source_key), MetadataDirective="REPLACE", **arguments
                )
            except OSError as error:
                if is_missing(error):
                    raise ImageMissingError(f"there is no {source.uri(source_key)}") from error
                raise
            return _tag(answer["CopyObjectResult"])

        once = expected is not Condition.ANYTHING
        return self._run(self._patiently("can't copy to", key, attempt, 0 if once else PATIENCE))

    def delete(self, key: str) -> None:
        async def attempt() -> None:
            await self._call_if_there("delete_object", key)

        self._run(self._patiently("can't delete", key, attempt))

    def list(self, prefix: str) -> Iterator[Listed]:
        token: dict[str, str] = {}
        while True:
            page = self._run(self._patiently("can't list", prefix, partial(self._page, prefix, token)))
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self._base)
                tag, written = found["ETag"].strip('"'), found["LastModified"].timestamp()
                yield Listed(key, int(found["Size"]), tag, written)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    async def _page(self, prefix: str, token: Mapping[str, str]) -> dict[str, Any]:
        where = {"Bucket": self.settings.bucket, "Prefix": self._base + prefix}
        page: dict[str, Any] = await self._fs._call_s3("list_objects_v2", **where, **token)
        return page

    def half_written(self) -> Iterator[Listed]:
        return iter(())  # uploads that were given up are ended by the bucket's own lifecycle rules

    def delete_half_written(self, key: str) -> None:
        raise StoreError(f"a bucket has no half-written objects: {key}")

    def presign(self, key: str, seconds: int) -> str:
        async def attempt() -> str:
            client = await self._fs.set_session()
            url: str = await client.generate_presigned_url(
                "get_object", Params=self._at(key), ExpiresIn=seconds
            )
            return url

        return self._run(self._patiently("can't sign an address for", key, attempt))

    def _name(self, key: str) -> str:
        return checked_key(self._base + key)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.settings.bucket, "Key": self._name(key)}

    def _shown(self, key: str) -> str:
        """The object and the service, for an error's message."""
        service = f" at {self.settings.account.endpoint_url}" if self.settings.account.endpoint_url else ""
        return f"s3://{self.settings.bucket}/{self._base}{key}{service}"

    async def _call_if_there(self, method: str, key: str) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = await self._fs._call_s3(method, **self._at(key))
        except OSError as error:
            if is_missing(error):
                return None
            raise
        return answer

    def _run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(work, self._fs.loop).result()

    async def _patiently(
        self,
        doing: str,
        key: str,
        attempt: Callable[[], Awaitable[Answer]],
        patience: float = PATIENCE,
    ) -> Answer:
        """What `attempt` gives, tried again for `patience` seconds while no answer settles it."""
        started, (pause, longest_pause) = time.monotonic(), _PAUSES
        while True:
            try:
                return await attempt()
            except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
                explained = explain(error, f"{doing} {self._shown(key)}")
                if not isinstance(explained, NoAnswerError) or time.monotonic() + pause > started + patience:
                    raise explained from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest_pause)


@lru_cache(maxsize=32)
def _connection(account: Account, process: int) -> s3fs.S3FileSystem:  # noqa: ARG001 - it doesn't survive a fork
    """One client, with its pool of connections, for all stores of an account."""
    filesystem = s3fs.S3FileSystem(
        key=account.access_key_id,
        secret=account.secret_access_key,
        token=account.session_token,
        endpoint_url=account.endpoint_url,
        client_kwargs={"region_name": account.region} if account.region else {},
        config_kwargs={
            # tries are counted here, in one place: s3fs and botocore would multiply them
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
            "connect_timeout": _CONNECT_TIMEOUT,
            "read_timeout": _READ_TIMEOUT,
            "signature_version": "s3v4",
            # trailing checksums are AWS's own; other stores refuse or ignore them
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
        skip_instance_cache=True,  # fsspec's cache would share the retries set below with other users
    )
    filesystem.retries = 1
    return filesystem


def _tag(answer: Mapping[str, Any]) -> str:
    # unquoted: Ceph refuses a quoted tag in If-Match
    return str(answer["ETag"]).strip('"')


def _described(facts: Facts) -> dict[str, Any]:
    described: dict[str, Any] = {"ContentType": facts.media_type, "Metadata": dict(facts.metadata)}
    return described | ({"CacheControl": facts.cache_control} if facts.cache_control else {})


def _conditions(expected: Condition | str) -> dict[str, str]:
    if isinstance(expected, str):
        return {"IfMatch": expected}
    return {"IfNoneMatch": "*"} if expected is Condition.NOTHING else {}
