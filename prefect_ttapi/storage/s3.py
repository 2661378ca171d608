"""Objects in an S3 bucket, through botocore: one request per operation, judged by its HTTP status."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

from botocore.exceptions import ClientError

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.storage.layout import s3_uri
from prefect_ttapi.storage.objects import (
    PATIENCE,
    Body,
    Condition,
    ConflictError,
    Facts,
    Found,
    Listed,
    ObjectStore,
    checked_key,
)
from prefect_ttapi.storage.s3_client import Account, Client, patiently
from prefect_ttapi.storage.s3_errors import is_missing, is_refused_copy

Answer = TypeVar("Answer")

_CHUNK: Final = 256 * 1024

#: Against accidents on the way, which is all that S3 offers it for.
_MD5: Final = partial(hashlib.md5, usedforsecurity=False)

#: How many objects are looked at side by side.
_SIDE_BY_SIDE: Final = 16

#: A write that expects it is refused wherever writing is allowed: no object has the MD5 of nothing at this key.
_TRIED: Final = "write-test"
_NO_TAG: Final = "0" * 32


@dataclass(frozen=True)
class S3Settings:
    """Where in a bucket objects are, without slashes around the prefix, and how they are encrypted."""

    bucket: str
    prefix: str
    account: Account
    encryption: str | None = None
    kms_key_id: str | None = None


class S3:
    """The keys below `prefix` in a bucket; safe from all threads, and after a fork."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._base = f"{settings.prefix}/" if settings.prefix else ""

    def uri(self, key: str) -> str:
        return s3_uri(self.settings.bucket, self._name(key))

    def key(self, uri: str) -> str:
        base = s3_uri(self.settings.bucket, self._base)
        if not uri.startswith(base):
            raise StoreError(f"{uri} is not in {base}")
        return checked_key(uri.removeprefix(base))

    def read(self, key: str) -> tuple[bytes, str] | None:
        return self._get(key, lambda chunks, tag: (b"".join(chunks), tag))

    def fetch(self, key: str) -> Body:
        spool = self._get(key, _spooled)
        if spool is None:
            raise ImageMissingError(f"there is no {self.uri(key)}")
        return spool.open

    def digest(self, key: str) -> tuple[int, str] | None:
        return self._get(key, _digest)

    def _get(self, key: str, take: Callable[[Iterator[bytes], str], Answer]) -> Answer | None:
        """Return what `take` makes of the object's bytes and tag, or None where there is no such object."""

        def attempt(client: Client) -> Answer | None:
            answer = _if_there(client.get_object, self._at(key))
            if answer is None:
                return None
            # what `with` over the body itself gives is urllib3's response, which may not check its length
            with closing(answer["Body"]) as body:
                return take(iter(partial(body.read, _CHUNK), b""), _tag_in(answer))

        return self._run("can't read", key, attempt)

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        if len(keys) < 2:
            return list(map(self._size, keys))
        with ThreadPoolExecutor(min(len(keys), _SIDE_BY_SIDE)) as threads:
            return list(threads.map(self._size, keys))

    def _size(self, key: str) -> int | None:
        found = self.look(key)
        return found.size if found else None

    def look(self, key: str) -> Found | None:
        at = self._at(key)
        facts = self._run("can't look at", key, lambda client: _if_there(client.head_object, at))
        if facts is None:
            return None
        size, written = int(facts["ContentLength"]), facts.get("LastModified")
        return Found(size, facts.get("Metadata", {}), _tag_in(facts), written and written.timestamp())

    def write(
        self,
        key: str,
        body: Body,
        facts: Facts,
        expected: Condition | str = Condition.ANYTHING,
        patience: float = PATIENCE,
    ) -> str:
        with body() as stream:
            md5 = hashlib.file_digest(stream, _MD5)  # type: ignore[arg-type]
            size = stream.seek(0, io.SEEK_END)
        arguments = self._description(key, facts) | _conditions(expected)
        arguments["ContentMD5"] = base64.b64encode(md5.digest()).decode()

        def attempt(client: Client) -> str:
            with body() as stream:
                return _tag_in(client.put_object(**arguments, Body=stream))

        tag = self._run("can't write", key, attempt, patience if expected is Condition.ANYTHING else 0)
        if not facts.sha256 or tag == md5.hexdigest():
            # the tag of what is kept plainly is its MD5: the service has what was sent, at no further request
            return tag
        found = self.look(key)
        if found and (found.size, found.metadata.get("sha256")) == (size, facts.sha256):
            return found.tag
        raise StoreError(f"can't write {self._shown(key)}: the service has something else than was sent")

    def try_writing(self, facts: Facts) -> None:
        try:
            self.write(_TRIED, io.BytesIO, facts, _NO_TAG)
        except ConflictError:
            return  # whoever may not write is told so before that
        self.delete(_TRIED)

    def room(self) -> None:
        return None

    def copy(
        self, source: ObjectStore, source_key: str, key: str, facts: Facts, expected: Condition
    ) -> str | None:
        if not isinstance(source, S3) or source.settings.account != self.settings.account:
            return None
        arguments = self._description(key, facts) | _conditions(expected)
        arguments |= {"CopySource": source._at(source_key), "MetadataDirective": "REPLACE"}
        arguments |= {"TaggingDirective": "REPLACE"} if facts.tags else {}

        def attempt(client: Client) -> str | None:
            try:
                answer = client.copy_object(**arguments)
            except ClientError as error:
                if is_missing(error):
                    raise ImageMissingError(f"there is no {source.uri(source_key)}") from error
                if is_refused_copy(error):
                    return None
                raise
            return _tag_in(answer["CopyObjectResult"])

        tag = self._run("can't copy to", key, attempt, PATIENCE if expected is Condition.ANYTHING else 0)
        if tag and facts.tags:
            # Ceph drops those that come with a copy
            tags = [{"Key": name, "Value": value} for name, value in facts.tags.items()]
            put = self._at(key) | {"Tagging": {"TagSet": tags}}
            self._run("can't tag", key, lambda client: client.put_object_tagging(**put))
        return tag

    def delete(self, key: str) -> None:
        at = self._at(key)
        self._run("can't delete", key, lambda client: _if_there(client.delete_object, at))

    def list(self, prefix: str) -> Iterator[Listed]:
        where = {"Bucket": self.settings.bucket, "Prefix": self._base + prefix}
        while True:
            page = self._run("can't list", prefix, lambda client: client.list_objects_v2(**where))
            for found in page.get("Contents", ()):
                key, written = found["Key"].removeprefix(self._base), found["LastModified"].timestamp()
                yield Listed(key, int(found["Size"]), _tag_in(found), written)
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def half_written(self) -> Iterator[Listed]:
        return iter(())  # an object is put at once

    def delete_half_written(self, key: str) -> None:
        raise StoreError(f"a bucket has no half-written objects: {key}")

    def presign(self, key: str, seconds: int) -> str:
        at = self._at(key)

        def attempt(client: Client) -> str:
            return str(client.generate_presigned_url("get_object", Params=at, ExpiresIn=seconds))

        return self._run("can't sign an address for", key, attempt)

    def _run(
        self, doing: str, key: str, attempt: Callable[[Client], Answer], patience: float = PATIENCE
    ) -> Answer:
        return patiently(self.settings.account, f"{doing} {self._shown(key)}", attempt, patience)

    def _name(self, key: str) -> str:
        return checked_key(self._base + key)

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.settings.bucket, "Key": self._name(key)}

    def _description(self, key: str, facts: Facts) -> dict[str, Any]:
        """Return where an object is put, what is kept beside its bytes, and how they are encrypted.

        What is not asked for is not said: services refuse headers that they don't know.
        """
        said = {
            "ContentType": facts.media_type,
            "Metadata": dict(facts.metadata),
            "CacheControl": facts.cache_control,
            "ContentDisposition": facts.disposition,
            # Ceph takes a plus sign for one, not for a space
            "Tagging": urlencode(facts.tags, quote_via=quote),
            "ACL": facts.acl,
            "StorageClass": facts.storage_class,
            "ServerSideEncryption": self.settings.encryption,
            "SSEKMSKeyId": self.settings.kms_key_id,
        }
        return self._at(key) | {name: value for name, value in said.items() if value}

    def _shown(self, key: str) -> str:
        """Return the object and the service, for an error's message."""
        service = f" at {self.settings.account.endpoint_url}" if self.settings.account.endpoint_url else ""
        return f"{s3_uri(self.settings.bucket, self._base + key)}{service}"


def _if_there(call: Callable[..., dict[str, Any]], at: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return call(**at)
    except ClientError as error:
        if is_missing(error):
            return None
        raise


def _spooled(chunks: Iterator[bytes], _tag: str) -> Spool:
    spool = Spool()
    for chunk in chunks:
        spool.write(chunk)
    return spool


def _digest(chunks: Iterator[bytes], _tag: str) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    for chunk in chunks:
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def _conditions(expected: Condition | str) -> dict[str, str]:
    """Return what has to be at the key, by botocore's names."""
    if isinstance(expected, str):
        return {"IfMatch": expected}
    return {"IfNoneMatch": "*"} if expected is Condition.NOTHING else {}


def _tag_in(answer: Mapping[str, Any]) -> str:
    """Return the object's tag, unquoted: Ceph refuses a quoted one in If-Match."""
    return str(answer["ETag"]).strip('"')
