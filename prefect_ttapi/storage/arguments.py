"""What a request to S3 says of an object, by botocore's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from prefect_ttapi.storage.objects import Condition, Facts


def description(facts: Facts, encryption: str | None, kms_key_id: str | None) -> dict[str, Any]:
    """All that is kept beside the bytes, and how they are encrypted.

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
        "ServerSideEncryption": encryption,
        "SSEKMSKeyId": kms_key_id,
    }
    return {name: value for name, value in said.items() if value}


def tag_set(tags: Mapping[str, str]) -> dict[str, Any]:
    """Tags for a request of their own."""
    return {"TagSet": [{"Key": name, "Value": value} for name, value in tags.items()]}


def conditions(expected: Condition | str) -> dict[str, str]:
    """What has to be at the key."""
    if isinstance(expected, str):
        return {"IfMatch": expected}
    return {"IfNoneMatch": "*"} if expected is Condition.NOTHING else {}


def tag_in(answer: Mapping[str, Any]) -> str:
    """The object's tag, unquoted: Ceph refuses a quoted one in If-Match."""
    return str(answer["ETag"]).strip('"')
