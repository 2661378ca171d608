"""Objects in an S3 bucket, through botocore: one request per operation, judged by its HTTP status."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.spool import Body, Spool
from prefect_ttapi.storage.layout import s3_uri
from prefect_ttapi.storage.objects import (
    Answer,
    Condition,
    ConflictError,
    Facts,
    Found,
    GoneError,
    Listed,
    ObjectStore,
    checked_key,
    patience,
    sha256_of,
)
from prefect_ttapi.storage.s3_service import (
    MD5,
    Account,
    Client,
    base64_of,
    client_for,
    explain,
    forget,
    may_be_expired,
)

_CHUNK: Final = 256 * 1024

#: What may go wrong with a request, on either side.
_FAILURES: Final = (BotoCoreError, ClientError, HTTPError, OSError, EOFError, zlib.error)

#: Endpoints that have answered this process: where nothing answers there now, somebody may be at it.
_answered: Final[set[str | None]] = set()

#: What proxies add to a tag, which conditions don't know: that it is weak, and how the answer was packed.
_NOT_THE_TAG: Final = re.compile(r'^W/|"|(--?|;)(gzip|br|deflate|zstd)(?="?$)')


@dataclass(frozen=True)
class S3(ObjectStore):
    """The keys below `prefix` in a bucket; safe from all threads, and after a fork.

    Attributes:
        prefix: without a slash at either end.
        encryption, kms_key_id: how objects are encrypted, as S3 takes it.
    """

    bucket: str
    prefix: str
    account: Account
    encryption: str | None = None
    kms_key_id: str | None = None

    @property
    def _base(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def uri(self, key: str) -> str:
        return s3_uri(self.bucket, self._name(key))

    def key(self, uri: str) -> str:
        base = s3_uri(self.bucket, self._base)
        if not uri.startswith(base):
            raise StoreError(f"{uri} is not in {base}")
        return checked_key(uri.removeprefix(base))

    def read(self, key: str) -> tuple[bytes, str] | None:
        found = self._get(key)
        return found and (found[0].read_bytes(), found[1])

    def fetch(self, key: str) -> Body:
        found = self._get(key)
        if found is None:
            raise ImageMissingError(f"there is no {self.uri(key)}")
        return found[0].open

    def digest(self, key: str) -> tuple[int, str] | None:
        found = self._get(key)
        return found and (found[0].size_bytes, found[0].sha256)

    def _get(self, key: str) -> tuple[Spool, str] | None:
        """Return the object's bytes and tag, or None where there is no such object."""
        at = self._at(key)

        def attempt(client: Client) -> tuple[Spool, str]:
            answer = client.get_object(**at)
            # what `with` over the body itself gives is urllib3's response, which may not check its length
            with closing(answer["Body"]) as body:
                packed = "gzip" in answer.get("ContentEncoding", "")  # by a proxy: nothing is put there so
                reader = gzip.GzipFile(fileobj=body) if packed else body
                return Spool.of(iter(partial(reader.read, _CHUNK), b"")), _tag_in(answer)

        found = self._if_there("can't read", key, attempt)
        if found is None or found[1]:
            return found
        # looked up before the bytes: with a tag older than they are nothing can be overwritten unseen
        tag = self._run("can't look at", key, lambda client: _tag_in(client.head_object(**at)))
        if not tag:
            raise StoreError(
                f"{self._shown(key)} has no ETag: use a service, or a proxy before it, that gives them"
            )
        return self._run("can't read", key, attempt)[0], tag

    def look(self, key: str) -> Found | None:
        at = self._at(key)
        facts = self._if_there("can't look at", key, lambda client: client.head_object(**at))
        if facts is None:
            return None
        written, size, tag = facts.get("LastModified"), facts.get("ContentLength"), _tag_in(facts)
        if size is None or not tag:
            found = self._get(key)
            if found is None:
                return None
            size, tag = found[0].size_bytes, tag or found[1]
        return Found(int(size), facts.get("Metadata", {}), tag, written and written.timestamp())

    def write(
        self, key: str, body: Body, facts: Facts, expected: Condition | str = Condition.ANYTHING
    ) -> str:
        with body() as stream:
            md5 = hashlib.file_digest(stream, MD5)  # type: ignore[arg-type]
        arguments = self._description(key, facts) | _conditions(expected)
        arguments["ContentMD5"] = base64_of(md5.digest())

        def attempt(client: Client) -> str:
            with body() as stream:
                return _tag_in(client.put_object(**arguments, Body=stream))

        if expected is Condition.ANYTHING:
            tag = self._run("can't write", key, attempt)
        else:
            tag = self._once("can't write", key, attempt, conditional=True)
        # the tag of what is kept plainly is its MD5: the service has what was sent, at no further request
        is_proven = (tag and not facts.sha256) or tag.lower() == md5.hexdigest()
        return tag if is_proven else self._proven(key, body, facts)

    def _proven(self, key: str, body: Body, facts: Facts) -> str:
        """Return the tag of the object that was just written, which is known by its metadata or else by its bytes.

        Raises:
            ConflictError: somebody has written something else since.
        """
        with body() as stream:
            size = stream.seek(0, io.SEEK_END)
        found = self.look(key) if facts.sha256 else None
        if found and (found.size, found.metadata.get("sha256")) == (size, facts.sha256):
            return found.tag
        there = self._get(key)
        if there and there[0].sha256 == sha256_of(body):
            return there[1]
        raise ConflictError(f"can't write {self._shown(key)}: the service has something else than was sent")

    def put_tags(self, key: str, facts: Facts) -> None:
        tags = [{"Key": name, "Value": value} for name, value in facts.tags.items()]
        if tags:
            put = self._at(key) | {"Tagging": {"TagSet": tags}}
            self._run("can't put upload.tags on", key, lambda client: client.put_object_tagging(**put))

    def copy(self, source: ObjectStore, source_key: str, key: str, facts: Facts, expected: Condition) -> bool:
        if not isinstance(source, S3) or source.account != self.account:
            return False
        arguments = self._description(key, facts) | _conditions(expected)
        arguments |= {"CopySource": source._at(source_key), "MetadataDirective": "REPLACE"}
        arguments |= {"TaggingDirective": "REPLACE"} if facts.tags else {}

        try:
            self._once("can't copy to", key, lambda client: client.copy_object(**arguments))
        except GoneError as error:
            raise ImageMissingError(f"there is no {source.uri(source_key)}") from error
        except ConflictError:
            raise
        except StoreError:
            return False  # it can't, may not or won't: whoever may read and write needs no copy
        self.put_tags(key, facts)  # Ceph drops those that come with a copy
        return True

    def delete(self, key: str) -> None:
        at = self._at(key)
        self._if_there("can't delete", key, lambda client: client.delete_object(**at))

    def list(self, prefix: str) -> Iterator[Listed]:
        base = self._base + prefix
        where, last = {"Bucket": self.bucket, "Prefix": base}, ""
        while True:
            page = self._run("can't list", prefix, lambda client: client.list_objects_v2(**where))
            names = [_name_below(base, found["Key"]) for found in page.get("Contents", ())]
            if last and names and names[0] == last:
                raise StoreError(
                    f"can't list {self._shown(prefix)}: the service gives its first page again and again"
                )
            for name, found in zip(names, page.get("Contents", ()), strict=True):
                written, size = found.get("LastModified"), int(found.get("Size", -1))
                key = name.removeprefix(self._base)
                yield Listed(key, size, _tag_in(found), written and written.timestamp())
            if not page.get("IsTruncated"):
                return
            where.pop("ContinuationToken", None)
            if token := page.get("NextContinuationToken"):
                where["ContinuationToken"] = token
            elif names:
                last, where["StartAfter"] = names[0], names[-1]
            else:
                raise StoreError(f"can't list {self._shown(prefix)}: the service doesn't say where to go on")

    def presign(self, key: str, seconds: int) -> str:
        at = self._at(key)

        def attempt(client: Client) -> str:
            return str(client.generate_presigned_url("get_object", Params=at, ExpiresIn=seconds))

        return self._run("can't sign an address for", key, attempt)

    def _if_there(self, doing: str, key: str, attempt: Callable[[Client], Answer]) -> Answer | None:
        """Return what `attempt` gives; None where there is no such object."""
        try:
            return self._run(doing, key, attempt)
        except GoneError:
            return None

    def _run(self, doing: str, key: str, attempt: Callable[[Client], Answer]) -> Answer:
        """Return what `attempt` gives, tried again while no answer settles it."""
        return patience().ask(partial(self._once, doing, key, attempt))

    def _once(
        self, doing: str, key: str, attempt: Callable[[Client], Answer], *, conditional: bool = False
    ) -> Answer:
        """Return what `attempt` gives.

        Credentials that may have expired are asked for anew, once, unless they are written down in the account.

        Raises:
            StoreError: the service refused, or there are no credentials.
            NoAnswerError: no answer settled it.
        """
        for renewable in (self.account.access_key_id is None, False):
            client = None
            try:
                client = client_for(self.account)
                answer = attempt(client)
            except _FAILURES as error:
                if isinstance(error, ClientError):
                    _answered.add(self.account.endpoint_url)
                if renewable and may_be_expired(error):
                    forget(self.account, client)
                    continue
                answered, what = self.account.endpoint_url in _answered, f"{doing} {self._shown(key)}"
                raise explain(error, what, answered=answered, conditional=conditional) from error
            _answered.add(self.account.endpoint_url)
            return answer
        raise AssertionError("a second failure is final")

    def _name(self, key: str) -> str:
        return checked_key(self._base + key)

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self._name(key)}

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
            "ServerSideEncryption": self.encryption,
            "SSEKMSKeyId": self.kms_key_id,
        }
        return self._at(key) | {name: value for name, value in said.items() if value}

    def _shown(self, key: str) -> str:
        """Return the object and the service, for an error's message."""
        service = f" at {self.account.endpoint_url}" if self.account.endpoint_url else ""
        return f"{s3_uri(self.bucket, self._base + key)}{service}"


def _conditions(expected: Condition | str) -> dict[str, str]:
    """Return the conditions of a write, by botocore's names."""
    if isinstance(expected, str):
        return {"IfMatch": expected}
    return {"IfNoneMatch": "*"} if expected is Condition.NOTHING else {}


def _tag_in(answer: Mapping[str, Any]) -> str:
    """Return the object's tag as conditions take it, empty where the answer has none.

    >>> _tag_in({"ETag": 'W/"ab-gzip"'}), _tag_in({"ETag": "ab-2"}), _tag_in({})
    ('ab', 'ab-2', '')
    """
    return _NOT_THE_TAG.sub("", answer.get("ETag") or "")


def _name_below(base: str, listed: str) -> str:
    """Return a listed object's name; some services encode it without saying so."""
    return listed if listed.startswith(base) else unquote(listed)
