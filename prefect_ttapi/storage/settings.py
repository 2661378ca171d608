"""The form of an image store: where it is, who may use it, and how objects are put there."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    SerializationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)

from prefect_ttapi.storage.aws_blocks import AwsBlock, checked_block, shown, with_block
from prefect_ttapi.storage.layout import bucket_and_prefix, normalised
from prefect_ttapi.storage.s3 import S3Settings
from prefect_ttapi.storage.s3_client import Account

#: Seconds for which what was paid for is tried to be stored, unless the block says otherwise.
UPLOAD_PATIENCE: Final = 120.0

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
    """Headers of objects on S3. A local folder only remembers them.

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

    @model_validator(mode="before")
    @classmethod
    def _forgets_parts(cls, given: Any) -> Any:
        # blocks that version 0.1.0 saved say from which size on images went in parts
        kept = given.items() if isinstance(given, dict) else ()
        return {name: value for name, value in kept if name != "multipart_above_mib"} if kept else given

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

    def disposition(self, key: str) -> str | None:
        """Return the Content-Disposition of an image delivered to `key` (RFC 6266), if one is wanted."""
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
        """Return, as botocore takes it, whether to verify, or against which file."""
        return self.ca_file or self.verify_tls


class NotMapped:
    """A block that `.map` takes as one value, with or without `unmapped`.

    `.map` iterates what it can, and a pydantic model would be its fields. Prefect itself reads the fields by
    `dict(block)`, which needs no iteration where there are keys.
    """

    __iter__: ClassVar[Any] = None

    def keys(self) -> KeysView[str]:
        """Return the names of the fields."""
        return vars(self).keys()

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]


class StoreSettings(BaseModel):
    """The fields of an `ImageStore`."""

    # pydantic's echo of the input would show secrets
    model_config = ConfigDict(hide_input_in_errors=True)

    url: str = Field(
        title="Folder or S3 address",
        description="A local folder, or s3://bucket/prefix. Images, ledger and manifests are kept below it.",
    )
    endpoint_url: str | None = Field(
        None,
        title="Endpoint URL",
        description="Of an S3 service other than AWS: Cloudflare R2, MinIO, Ceph. "
        "Else AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS.",
    )
    region: str | None = Field(
        None, title="Region", description="Else AWS_REGION, else as AWS's tools find it."
    )
    access_key_id: str | None = Field(
        None, title="Access key ID", description="Else as AWS's tools find it: environment, profile, role."
    )
    secret_access_key: SecretStr | None = Field(
        None, title="Secret access key", description="Belongs to the access key ID."
    )
    session_token: SecretStr | None = Field(
        None, title="Session token", description="Only with temporary credentials."
    )
    aws_credentials: Annotated[Any, WithJsonSchema({"type": "string"})] = Field(
        None,
        title="AWS credentials block",
        description="Instead of keys, a block of prefect-aws: aws-credentials/NAME or minio-credentials/NAME. "
        "In code also the block itself.",
        repr=False,  # a block's own session token is no secret to it
    )
    public_base_url: str | None = Field(
        None,
        title="Public base URL",
        description="Public address of the folder or prefix above, as a CDN's: delivered images get a link.",
    )
    signed_links: int | None = Field(
        None,
        ge=1,
        le=604_800,
        title="Signed links",
        description="Seconds for which links of Prefect's artifacts to a private bucket are signed: whoever sees the "
        "run may then open them. Else they are not signed.",
    )
    cache_control: str | None = Field(
        None,
        title="Cache-Control",
        description="Said to browsers and CDNs of images on S3, as public, max-age=31536000, immutable.",
    )
    upload: UploadOptions = Field(
        default_factory=UploadOptions,
        title="Upload",
        description="What is said of objects on S3: disposition, tags, ACL, storage class, encryption.",
    )
    connection: ConnectionOptions = Field(
        default_factory=ConnectionOptions,
        title="Connection",
        description="How the S3 service is reached: addressing style, TLS.",
    )
    patience: float = Field(
        UPLOAD_PATIENCE,
        ge=0,
        allow_inf_nan=False,
        title="Patience",
        description="Seconds to go on trying to store images that are paid for while the store fails.",
    )
    claim_ttl: float = Field(
        60,
        gt=0,
        le=3600,
        title="Claim's life",
        description="Seconds for which others wait for a run that has fallen silent while it was sending a request.",
    )
    rescue_folder: str | None = Field(
        None,
        title="Rescue folder",
        description="Where images that are paid for wait on this machine when the store fails for longer than that; "
        "the next run takes them from there. Else $XDG_STATE_HOME/prefect-ttapi/rescue, or below ~/.local/state.",
    )

    @field_validator("url")
    @classmethod
    def _is_a_place(cls, url: str) -> str:
        return normalised(url)

    @field_validator("endpoint_url", "public_base_url")
    @classmethod
    def _is_a_web_address(cls, url: str | None) -> str | None:
        return _checked_web_address(url) if url else None

    @field_validator("cache_control")
    @classmethod
    def _fits_a_header(cls, text: str | None) -> str | None:
        return header_text(text)

    @field_validator("aws_credentials")
    @classmethod
    def _is_a_block(cls, given: object) -> object:
        return checked_block(given)

    @field_serializer("aws_credentials")
    def _by_name(self, block: str | AwsBlock | None, info: SerializationInfo) -> str | None:
        return shown(block, saving=bool((info.context or {}).get("include_secrets")))

    @model_validator(mode="after")
    def _has_both_keys_or_none(self) -> Self:
        if bool(self.access_key_id) != bool(self.secret_access_key):
            raise ValueError("access_key_id and secret_access_key belong together: give both or neither")
        if self.access_key_id and self.aws_credentials:
            raise ValueError("give aws_credentials or keys, not both")
        return self

    def _settings(self) -> S3Settings:
        account = Account(
            endpoint_url=self.endpoint_url,
            region=self.region,
            access_key_id=self.access_key_id,
            secret_access_key=_told(self.secret_access_key),
            session_token=_told(self.session_token),
            addressing_style=self.connection.addressing_style,
            verify=self.connection.verify,
        )
        return S3Settings(
            *bucket_and_prefix(self.url),
            with_block(account, self.aws_credentials).or_environment(),
            encryption=self.upload.encryption,
            kms_key_id=self.upload.kms_key_id,
        )


def header_text(text: str | None) -> str | None:
    """Return `text`, if a header may hold it; None for nothing.

    Raises:
        ValueError: it holds other than printable ASCII.
    """
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


def _checked_web_address(url: str) -> str:
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
        raise ValueError("is no address like https://example.com")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("takes no user, password, query or fragment")
    return url.strip().rstrip("/")


def _told(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
