"""Objects in an S3 bucket, through s3fs's client: one request per operation, judged by its HTTP status."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.storage.accounts import Account
from prefect_ttapi.storage.arguments import conditions, description, tag_in, tag_set
from prefect_ttapi.storage.layout import s3_uri
from prefect_ttapi.storage.multipart import Upload
from prefect_ttapi.storage.objects import (
    PATIENCE,
    Body,
    Condition,
    ConflictError,
    Facts,
    Found,
    Listed,
    NoAnswerError,
    ObjectStore,
    checked_key,
)
from prefect_ttapi.storage.parts import Part, parts_of, plain_tag, size_of
from prefect_ttapi.storage.s3_errors import is_missing, is_refused_copy
from prefect_ttapi.storage.service import Service

Answer = TypeVar("Answer")

_CHUNK: Final = 256 * 1024

#: Where it is tried whether one may write.
_TRIED: Final = "write-test"


@dataclass(frozen=True)
class S3Settings:
    """Where in a bucket objects are, without slashes around the prefix, and how they are put there."""

    bucket: str
    prefix: str
    account: Account
    encryption: str | None = None
    kms_key_id: str | None = None
    multipart_above: int = 64 * 1024 * 1024


class S3:
    """The keys below `prefix` in a bucket; safe from all threads, not across a fork."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._base = f"{settings.prefix}/" if settings.prefix else ""
        self._service = Service(settings.account)

    def uri(self, key: str) -> str:
        return s3_uri(self.settings.bucket, self._name(key))

    def key(self, uri: str) -> str:
        base = s3_uri(self.settings.bucket, self._base)
        if not uri.startswith(base):
            raise StoreError(f"{uri} is not in {base}")
        return checked_key(uri.removeprefix(base))

    def read(self, key: str) -> tuple[bytes, str] | None:
        async def attempt() -> tuple[bytes, str] | None:
            answer = await self._call_if_there("get_object", key)
            if answer is None:
                return None
            return b"".join([chunk async for chunk in _chunks(answer)]), tag_in(answer)

        return self._run("can't read", key, attempt)

    def fetch(self, key: str) -> Body:
        async def attempt() -> Spool | None:
            spool = Spool()
            answer = await self._call_if_there("get_object", key)
            if answer is None:
                return None
            async for chunk in _chunks(answer):
                spool.write(chunk)
            return spool

        spool = self._run("can't read", key, attempt)
        if spool is None:
            raise ImageMissingError(f"there is no {self.uri(key)}")
        return spool.open

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        async def all_facts() -> list[Found | None]:
            return list(await asyncio.gather(*map(self._look, keys)))

        return [found.size if found else None for found in self._service.run(all_facts())]

    def digest(self, key: str) -> tuple[int, str] | None:
        async def attempt() -> tuple[int, str] | None:
            answer = await self._call_if_there("get_object", key)
            if answer is None:
                return None
            size, digest = 0, hashlib.sha256()
            async for chunk in _chunks(answer):
                size += len(chunk)
                digest.update(chunk)
            return size, digest.hexdigest()

        return self._run("can't read", key, attempt)

    def look(self, key: str) -> Found | None:
        return self._service.run(self._look(key))

    async def _look(self, key: str) -> Found | None:
        facts = await self._patiently("can't look at", key, lambda: self._call_if_there("head_object", key))
        if facts is None:
            return None
        size, written = int(facts["ContentLength"]), facts.get("LastModified")
        return Found(size, facts.get("Metadata", {}), tag_in(facts), written and written.timestamp())

    def write(
        self,
        key: str,
        body: Body,
        facts: Facts,
        expected: Condition | str = Condition.ANYTHING,
        patience: float = PATIENCE,
    ) -> str:
        parts = parts_of(body, self.settings.multipart_above)
        patience = patience if expected is Condition.ANYTHING else 0
        if len(parts) == 1:
            put = partial(self._put, key, body, facts, expected, parts[0])
            tag = self._run("can't write", key, put, patience)
        else:
            tag = self._write_in_parts(key, body, facts, expected, max(patience, PATIENCE), parts)
            self._put_tags(key, facts)
        if not facts.sha256 or tag == plain_tag(parts):
            # the plain tag is an MD5: the service has what was sent, at no further request
            return tag
        if found := self._holds(key, facts, size_of(parts)):
            return found.tag  # which Ceph does not tell at the end of an upload in parts
        raise StoreError(f"can't write {self._shown(key)}: the service has something else than was sent")

    async def _put(self, key: str, body: Body, facts: Facts, expected: Condition | str, whole: Part) -> str:
        with body() as stream:
            answer = await self._service.call(
                "put_object",
                **self._place(key, facts),
                **conditions(expected),
                Body=stream,
                ContentMD5=whole.content_md5,
            )
        return tag_in(answer)

    def _write_in_parts(
        self,
        key: str,
        body: Body,
        facts: Facts,
        expected: Condition | str,
        patience: float,
        parts: Sequence[Part],
    ) -> str:
        steps = partial(self._patiently, "can't write", key)
        look = partial(self._must_find, key, expected)
        upload = Upload(self._service, steps, self._place(key, facts), conditions(expected), look)
        try:
            return self._service.run(upload.send(body, parts, patience))
        except NoAnswerError:
            # an upload whose last answer was lost is not sent again where it arrived
            if expected is Condition.ANYTHING and (found := self._holds(key, facts, size_of(parts))):
                return found.tag
            raise

    async def _must_find(self, key: str, expected: Condition | str) -> None:
        if expected is not Condition.ANYTHING:
            found = await self._look(key)
            if (found.tag if found else Condition.NOTHING) != expected:
                raise ConflictError(f"can't write {self._shown(key)}: it is not as expected")

    def _holds(self, key: str, facts: Facts, size: int) -> Found | None:
        """The object at `key` if it is the one that was sent."""
        found = self.look(key)
        same = found and facts.sha256 and (found.size, found.metadata.get("sha256")) == (size, facts.sha256)
        return found if same else None

    def try_writing(self, facts: Facts) -> None:
        async def attempt() -> None:
            # whoever may begin an upload may write; one that is given up leaves no object
            begun = await self._service.call("create_multipart_upload", **self._place(_TRIED, facts))
            await self._service.call("abort_multipart_upload", **self._at(_TRIED), UploadId=begun["UploadId"])

        self._run("can't write", _TRIED, attempt)

    def room(self) -> None:
        return None

    def copy(
        self, source: ObjectStore, source_key: str, key: str, facts: Facts, expected: Condition
    ) -> str | None:
        if not isinstance(source, S3) or source.settings.account != self.settings.account:
            return None
        arguments = self._place(key, facts) | conditions(expected)
        arguments |= {"CopySource": source._at(source_key), "MetadataDirective": "REPLACE"}
        arguments |= {"TaggingDirective": "REPLACE"} if facts.tags else {}

        async def attempt() -> str | None:
            try:
                answer = await self._service.call("copy_object", **arguments)
            except OSError as error:
                if is_missing(error):
                    raise ImageMissingError(f"there is no {source.uri(source_key)}") from error
                if is_refused_copy(error):
                    return None
                raise
            return tag_in(answer["CopyObjectResult"])

        once = expected is not Condition.ANYTHING
        tag = self._run("can't copy to", key, attempt, 0 if once else PATIENCE)
        if tag:
            self._put_tags(key, facts)
        return tag

    def _put_tags(self, key: str, facts: Facts) -> None:
        # Ceph drops those that come with a copy or an upload in parts
        if facts.tags:
            arguments = self._at(key) | {"Tagging": tag_set(facts.tags)}
            self._run("can't tag", key, lambda: self._service.call("put_object_tagging", **arguments))

    def delete(self, key: str) -> None:
        async def attempt() -> None:
            await self._call_if_there("delete_object", key)

        self._run("can't delete", key, attempt)

    def list(self, prefix: str) -> Iterator[Listed]:
        token: dict[str, str] = {}
        while True:
            page = self._run("can't list", prefix, partial(self._page, prefix, token))
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self._base)
                tag, written = found["ETag"].strip('"'), found["LastModified"].timestamp()
                yield Listed(key, int(found["Size"]), tag, written)
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    async def _page(self, prefix: str, token: Mapping[str, str]) -> dict[str, Any]:
        where = {"Bucket": self.settings.bucket, "Prefix": self._base + prefix}
        return await self._service.call("list_objects_v2", **where, **token)

    def half_written(self) -> Iterator[Listed]:
        return iter(())  # uploads that were given up are ended by the bucket's own lifecycle rules

    def delete_half_written(self, key: str) -> None:
        raise StoreError(f"a bucket has no half-written objects: {key}")

    def presign(self, key: str, seconds: int) -> str:
        return self._run(
            "can't sign an address for",
            key,
            partial(self._service.sign, "get_object", self._at(key), seconds),
        )

    def _name(self, key: str) -> str:
        return checked_key(self._base + key)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.settings.bucket, "Key": self._name(key)}

    def _place(self, key: str, facts: Facts) -> dict[str, Any]:
        """Where an object is put, and all that is said of it."""
        said = description(facts, self.settings.encryption, self.settings.kms_key_id)
        return self._at(key) | said

    def _shown(self, key: str) -> str:
        """The object and the service, for an error's message."""
        service = f" at {self.settings.account.endpoint_url}" if self.settings.account.endpoint_url else ""
        return f"{s3_uri(self.settings.bucket, self._base + key)}{service}"

    async def _call_if_there(self, method: str, key: str) -> dict[str, Any] | None:
        try:
            return await self._service.call(method, **self._at(key))
        except OSError as error:
            if is_missing(error):
                return None
            raise

    def _run(
        self, doing: str, key: str, attempt: Callable[[], Awaitable[Answer]], patience: float = PATIENCE
    ) -> Answer:
        return self._service.run(self._patiently(doing, key, attempt, patience))

    async def _patiently(
        self, doing: str, key: str, attempt: Callable[[], Awaitable[Answer]], patience: float = PATIENCE
    ) -> Answer:
        return await self._service.patiently(f"{doing} {self._shown(key)}", attempt, patience)


async def _chunks(answer: Mapping[str, Any]) -> AsyncIterator[bytes]:
    body = answer["Body"]
    # what `async with` gives is another object below aiobotocore 3.8, which reads all or nothing
    async with body:
        while chunk := await body.read(_CHUNK):
            yield chunk
