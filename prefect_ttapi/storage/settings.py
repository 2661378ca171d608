"""What is asked for in an image store's form: where it is, who may use it, and how."""

from __future__ import annotations

from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

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

from prefect_ttapi.storage.accounts import Account
from prefect_ttapi.storage.aws_blocks import AwsBlock, checked_block, shown
from prefect_ttapi.storage.layout import bucket_and_prefix, normalised
from prefect_ttapi.storage.options import ConnectionOptions, UploadOptions, header_text
from prefect_ttapi.storage.s3 import S3Settings

#: Seconds for which what was paid for is tried to be stored, unless the block says otherwise.
UPLOAD_PATIENCE: Final = 120.0


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
            block=self.aws_credentials,
        )
        return S3Settings(
            *bucket_and_prefix(self.url),
            account.or_block().or_environment(),
            encryption=self.upload.encryption,
            kms_key_id=self.upload.kms_key_id,
            multipart_above=self.upload.multipart_above,
        )


def _checked_web_address(url: str) -> str:
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
        raise ValueError("is no address like https://example.com")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("takes no user, password, query or fragment")
    return url.strip().rstrip("/")


def _told(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
