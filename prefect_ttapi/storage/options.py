"""How objects are put into a bucket, and how the bucket's service is reached: what a block's form asks for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_MIB: Final = 1024 * 1024

#: S3's limits on an object's tags: how many, characters of a key, characters of a value.
_MOST_TAGS: Final = 10
_LONGEST_TAG_KEY: Final = 128
_LONGEST_TAG_VALUE: Final = 256
#: Besides letters, digits and spaces of any script.
_TAG_MARKS: Final = frozenset("+-=._:/@")

#: Classes whose objects have to be restored before anybody can read them.
_ARCHIVES: Final = frozenset({"GLACIER", "DEEP_ARCHIVE"})

#: What a file name may hold in a header as it is (RFC 8187), and what stays in its plain ASCII twin.
_HEADER_MARKS: Final = "!#$&+-.^_`|~"
_NOT_PLAIN: Final = re.compile(r"[^ !#-\[\]-~]|%")


class _Options(BaseModel):
    # a misspelt option is an error; the echo of the input stays out of errors as in the block
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class UploadOptions(_Options):
    """What is said of objects on S3 when they are put there. A local folder only remembers it.

    >>> print(UploadOptions(content_disposition="attachment").disposition("2031/Zoë.png"))
    attachment; filename="Zo_.png"; filename*=UTF-8''Zo%C3%AB.png
    """

    content_disposition: Literal["attachment", "inline"] | None = Field(
        None,
        title="Content-Disposition",
        description="Of delivered images: whether browsers save them under their name, or show them.",
    )
    tags: dict[str, str] = Field(
        default_factory=dict, title="Tags", description="Of delivered images; at most 10."
    )
    acl: (
        Literal[
            "private", "public-read", "authenticated-read", "bucket-owner-read", "bucket-owner-full-control"
        ]
        | None
    ) = Field(
        None,
        title="ACL",
        description="Of delivered images, where a bucket still uses access control lists.",
    )
    prompt_in_metadata: bool = Field(
        False,
        title="Prompt in metadata",
        description="Of delivered images, percent-encoded: whoever may read an image can then read its prompt.",
    )
    storage_class: str | None = Field(
        None,
        title="Storage class",
        description="Of all images, as STANDARD_IA; not one that has to be restored before it can be read.",
    )
    encryption: Literal["AES256", "aws:kms"] | None = Field(
        None,
        title="Server-side encryption",
        description="Of everything written, the ledger too: AES256 with the service's own keys, or aws:kms.",
    )
    kms_key_id: str | None = Field(
        None,
        title="KMS key",
        description="ID or ARN of the key for aws:kms; else the service's default key.",
    )
    multipart_above_mib: int = Field(
        64,
        title="Multipart above",
        description="MiB above which an image is sent in parts.",
        ge=5,
        le=5_000,
    )

    @field_validator("tags")
    @classmethod
    def _are_legal(cls, tags: dict[str, str]) -> dict[str, str]:
        if wrong := _wrong_with_tags(tags):
            raise ValueError(wrong)
        return tags

    @field_validator("storage_class")
    @classmethod
    def _can_be_read_at_once(cls, name: str | None) -> str | None:
        if name in _ARCHIVES:
            raise ValueError(f"images in {name} can't be read without restoring them: use GLACIER_IR")
        if name and not re.fullmatch(r"[A-Z0-9_]{1,64}", name):
            raise ValueError("is no storage class: capital letters, digits and underscores, as STANDARD_IA")
        return name or None

    @field_validator("kms_key_id")
    @classmethod
    def _fits_a_header(cls, text: str | None) -> str | None:
        return header_text(text)

    @model_validator(mode="after")
    def _has_a_key_for_kms_only(self) -> Self:
        if self.kms_key_id and self.encryption != "aws:kms":
            raise ValueError("kms_key_id goes with encryption='aws:kms'")
        return self

    @property
    def multipart_above(self) -> int:
        """Bytes above which an image is sent in parts."""
        return self.multipart_above_mib * _MIB

    def disposition(self, key: str) -> str | None:
        """The Content-Disposition of an image delivered to `key` (RFC 6266), if one is wanted."""
        if self.content_disposition is None:
            return None
        name = key.rpartition("/")[2]
        plain = _NOT_PLAIN.sub("_", name)
        encoded = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe=_HEADER_MARKS)}"
        return f'{self.content_disposition}; filename="{plain}"{encoded}'


class ConnectionOptions(_Options):
    """How an S3 service is reached."""

    addressing_style: Literal["auto", "path", "virtual"] = Field(
        "auto",
        title="Addressing style",
        description="Where the bucket's name goes: path (host/bucket/key), virtual (bucket.host/key), or auto: "
        "virtual on AWS, path elsewhere.",
    )
    verify_tls: bool = Field(
        True,
        title="Verify TLS",
        description="Whether the service must prove who it is. Off, anybody on the way can read and alter.",
    )
    ca_file: str | None = Field(
        None,
        title="CA file",
        description="Certificates to trust, in PEM, where the service's own is from a private authority.",
    )

    @field_validator("ca_file")
    @classmethod
    def _is_absolute(cls, path: str | None) -> str | None:
        # a later change of directory changes nothing
        return str(Path(path).expanduser().absolute()) if path else None

    @model_validator(mode="after")
    def _verifies_with_its_file(self) -> Self:
        if self.ca_file and not self.verify_tls:
            raise ValueError("ca_file is of no use with verify_tls off: leave out one of them")
        return self

    @property
    def verify(self) -> bool | str:
        """As botocore takes it: whether to verify, or against which file."""
        return self.ca_file or self.verify_tls


def header_text(text: str | None) -> str | None:
    """`text`, if a header may hold it; None for nothing. ValueError: it may not."""
    if text and not (text.isascii() and text.isprintable()):
        raise ValueError("holds characters that no HTTP header may have")
    return text or None


def _wrong_with_tags(tags: Mapping[str, str]) -> str | None:
    checks = (
        (len(tags) > _MOST_TAGS, f"an object has at most {_MOST_TAGS} tags, not {len(tags)}"),
        (
            any(not 1 <= len(key) <= _LONGEST_TAG_KEY for key in tags),
            f"a tag's key has 1 to {_LONGEST_TAG_KEY} characters",
        ),
        (
            any(len(value) > _LONGEST_TAG_VALUE for value in tags.values()),
            f"a tag's value has at most {_LONGEST_TAG_VALUE} characters",
        ),
        (any(key.lower().startswith("aws:") for key in tags), "tags that begin with aws: are AWS's own"),
        (
            not all(map(_fits_a_tag, "".join([*tags, *tags.values()]))),
            "a tag holds letters, digits, spaces and + - = . _ : / @ only",
        ),
    )
    return next((reason for failed, reason in checks if failed), None)


def _fits_a_tag(character: str) -> bool:
    return character in _TAG_MARKS or unicodedata.category(character)[0] in "LN" or character == " "
