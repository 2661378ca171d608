"""The block of an image store, with the operations that the package needs there."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self
from urllib.parse import quote

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, SecretStr, SerializationInfo, field_serializer, model_validator

from prefect_ttapi.errors import StoreError
from prefect_ttapi.results import GeneratedImage, StoredImage
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.folder import Folder
from prefect_ttapi.storage.layout import IMAGES, bucket_and_prefix, image_key, is_s3, normalised, split_at
from prefect_ttapi.storage.objects import (
    Condition,
    Facts,
    Listed,
    ObjectStore,
    ascii_metadata,
    probe,
    waiting,
)
from prefect_ttapi.storage.s3 import S3
from prefect_ttapi.storage.s3_service import Account
from prefect_ttapi.storage.settings import (
    AwsBlock,
    AwsCredentials,
    ConnectionOptions,
    HeaderText,
    LocalPath,
    SavedForm,
    Secret,
    StoreUrl,
    UploadOptions,
    WebAddress,
    with_block,
)

#: Seconds for which what was paid for is tried to be stored, unless the block says otherwise.
UPLOAD_PATIENCE: Final = 120.0

#: Stores that this process has found to keep their promises; one thread asks, the others wait.
_probed: set[str] = set()
_probing = threading.Lock()


class ImageStore(SavedForm, Block):
    """The place where images live: a local folder or an S3 bucket, with the ledger of paid requests beside them.

    Example:
        Load the block that was saved in the UI or by `save`:

        ```python
        from prefect_ttapi import ImageStore

        store = ImageStore.load("BLOCK_NAME")
        ```

    >>> ImageStore(url="s3://pictures/campaigns", endpoint_url="https://minio.example.com").identity
    's3://pictures/campaigns at https://minio.example.com'
    """

    model_config = ConfigDict(title="Image store block")

    _block_type_name = "TTAPI Image Store"
    _block_type_slug = "ttapi-image-store"
    _renewed = frozenset({"access_key_id"})
    _description = (
        "This block keeps generated images in a folder or an S3 bucket, and remembers what was paid for."
    )

    # where
    url: StoreUrl = Field(title="Folder or S3 address")
    """Images, ledger and manifests are kept in this local folder, or below this s3://bucket/prefix."""
    public_base_url: WebAddress = None
    """If the public can read the folder or prefix, for example through a CDN, delivered images link to this address."""
    # how it is reached
    endpoint_url: WebAddress = Field(
        default=None,
        description="Cloudflare R2, MinIO, Ceph and other S3 services are reached at this address. Without it, "
        "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is used, and otherwise AWS.",
    )
    region: str | None = None
    """Without a region, AWS_REGION is used, and otherwise what AWS's own tools find."""
    aws_credentials: AwsCredentials = Field(
        default=None,
        title="AWS credentials block",
        description="A block of prefect-aws can be used instead of keys: aws-credentials/NAME or "
        "minio-credentials/NAME.",
        repr=False,  # a block's own session token is no secret to it
    )
    access_key_id: str | None = None
    """Without keys, they are found as AWS's own tools find them: environment, profile, role."""
    secret_access_key: Secret = None
    """This is the secret of the access key ID."""
    session_token: Secret = None
    """Only temporary credentials have a session token."""
    signed_links: int | None = Field(
        default=None,
        ge=1,
        le=604_800,
        description="Links in Prefect to a private bucket are signed for so many seconds: whoever sees the run can "
        "then open the images. Without a number, they are not signed.",
    )
    connection: ConnectionOptions = Field(
        default_factory=ConnectionOptions, title="How the service is reached"
    )
    """Most services need nothing of this."""
    # how objects are written
    cache_control: HeaderText = Field(default=None, title="Cache-Control")
    """S3 sends this header with images, for example public, max-age=31536000, immutable."""
    upload: UploadOptions = Field(default_factory=UploadOptions, title="How objects are written")
    """Most buckets need nothing of this."""
    patience: float = Field(default=UPLOAD_PATIENCE, ge=0, allow_inf_nan=False)
    """If the store fails, images that are paid for are tried again for so many seconds."""
    patience_before: float = Field(default=60, ge=0, allow_inf_nan=False, title="Patience before paying")
    """If the store fails before anything is paid for, it is tried again for so many seconds."""
    claim_ttl: float = Field(default=60, gt=0, le=3600, title="Life of a claim")
    """If a run falls silent while it sends a request, others take the request over after so many seconds."""
    rescue_folder: LocalPath = Field(
        default=None,
        description="If the store fails for longer than that, images that are paid for wait in this folder for the "
        "next run. Without it, $XDG_STATE_HOME/prefect-ttapi/rescue is used, or the same below ~/.local/state.",
    )

    @field_serializer("aws_credentials")
    def _by_name(self, block: str | AwsBlock | None, info: SerializationInfo) -> str | None:
        if block is None or isinstance(block, str):
            return block
        if info.context and info.context.get("include_secrets"):  # the store is saved, not only shown
            raise ValueError(f"save the {type(block).__name__} block first: a store keeps its name")
        return f"{type(block).__name__} (not saved)"

    @model_validator(mode="after")
    def _has_both_keys_or_none(self) -> Self:
        if bool(self.access_key_id) != bool(self.secret_access_key):
            raise ValueError("access_key_id and secret_access_key belong together: give both or neither")
        if self.access_key_id and self.aws_credentials:
            raise ValueError("give aws_credentials or keys, not both")
        return self

    if TYPE_CHECKING:  # type checkers take a field's type for what may be given

        def __init__(
            self,
            *,
            url: str | Path,
            endpoint_url: str | None = ...,
            region: str | None = ...,
            access_key_id: str | None = ...,
            secret_access_key: SecretStr | str | None = ...,
            session_token: SecretStr | str | None = ...,
            aws_credentials: object = ...,
            public_base_url: str | None = ...,
            signed_links: int | None = ...,
            cache_control: str | None = ...,
            upload: UploadOptions | Mapping[str, Any] = ...,
            connection: ConnectionOptions | Mapping[str, Any] = ...,
            patience: float = ...,
            patience_before: float = ...,
            claim_ttl: float = ...,
            rescue_folder: str | Path | None = ...,
        ) -> None: ...

    def _bucket(self) -> S3:
        account = Account(
            endpoint_url=self.endpoint_url,
            region=self.region,
            access_key_id=self.access_key_id,
            secret_access_key=_told(self.secret_access_key),
            session_token=_told(self.session_token),
            addressing_style=self.connection.addressing_style,
            verify=self.connection.verify,
        )
        return S3(
            *bucket_and_prefix(self.url),
            with_block(account, self.aws_credentials).or_environment(),
            encryption=self.upload.encryption,
            kms_key_id=self.upload.kms_key_id,
        )

    @property
    def identity(self) -> str:
        """Return which store this is, without secrets: equal for blocks that see the same objects."""
        if not is_s3(self.url):
            return Path(self.url).as_uri()
        endpoint = self._bucket().account.endpoint_url
        return f"{self.url} at {endpoint}" if endpoint else self.url

    @property
    def objects(self) -> ObjectStore:
        """Return the folder or bucket itself."""
        return self._bucket() if is_s3(self.url) else Folder(Path(self.url))

    def before_paying(self, stop: Stop | None = None) -> AbstractContextManager[None]:
        """Have this thread wait for the store, within the block, as long as `patience_before` says.

        Args:
            stop: ends such a wait.
        """
        return waiting(self.patience_before, stop)

    def check(self) -> None:
        """Make sure that objects can be written and read, and that of two writers one loses.

        It takes 4 small requests, 5 the first time, and leaves `ledger/probe.json`.

        Raises:
            StoreError: the store is of no use; one line says what is wrong, and what to do.
        """
        with self.before_paying():
            probe(self.objects, self._facts("application/json", "", {}))
        _probed.add(self.identity)

    def check_once(self) -> None:
        """Call `check`, unless this process has found the store in order before."""
        if self.identity in _probed:
            return
        with _probing:
            if self.identity not in _probed:
                self.check()

    def put_image(self, image: GeneratedImage, metadata: Mapping[str, str]) -> StoredImage:
        """Keep an image under its own SHA-256; one that is there already is written again, damaged or not.

        Args:
            metadata: kept beside the object on S3; values are percent-encoded if not ASCII, and cut if too long.
        """
        key = image_key(image.sha256, image.media_type)
        # without a look first: a fresh image is hardly ever there, and a look costs as much as the ledger's writes
        self.objects.write(key, image.open, self._facts(image.media_type, image.sha256, metadata))
        return self.reference(image)

    def reference(self, image: GeneratedImage) -> StoredImage:
        """Return the reference that `put_image` gives for an image, whether the image is there or not."""
        return StoredImage(
            uri=self.uri(image_key(image.sha256, image.media_type)),
            sha256=image.sha256,
            size_bytes=image.size_bytes,
            media_type=image.media_type,
            width=image.width,
            height=image.height,
            index=image.index,
            revised_prompt=image.revised_prompt,
            marks=image.marks,
        )

    def missing(self, images: Iterable[StoredImage]) -> list[StoredImage]:
        """Return those of `images` that are gone or have another length than recorded; looked at side by side."""
        expected = list(images)
        objects = self.objects
        sizes = objects.sizes([objects.key(image.uri) for image in expected])
        return [image for image, size in zip(expected, sizes, strict=True) if size != image.size_bytes]

    def open(self, uri: str) -> BinaryIO:
        """Return a reader over an object of this store; one from S3 is first fetched into a temporary file.

        Raises:
            ImageMissingError: there is no such object.
        """
        return self.objects.fetch(self.objects.key(uri))()

    def read_bytes(self, uri: str) -> bytes:
        """Return all of an object of this store.

        Raises:
            ImageMissingError: there is no such object.
        """
        with self.open(uri) as reader:
            return reader.read()

    def size(self, uri_or_key: str) -> int | None:
        """Return the length in bytes, or None where there is no such object."""
        objects = self.objects
        return objects.sizes([objects.key(uri_or_key) if "://" in uri_or_key else uri_or_key])[0]

    def write(self, key: str, data: bytes, media_type: str) -> str:
        """Write a small document (manifest, page), replacing what is there; return its address."""
        self.objects.write(key, lambda: io.BytesIO(data), Facts(media_type))
        return self.objects.uri(key)

    def read(self, key: str) -> bytes | None:
        """Return a small document, or None where there is none."""
        found = self.objects.read(key)
        return found and found[0]

    def list(self, prefix: str) -> Iterator[Listed]:
        """Yield key, size and tag of every object whose key starts with `prefix`, in no particular order."""
        return self.objects.list(prefix)

    def remove(self, key: str) -> None:
        """Remove an object, if it is there.

        For tidying up only: nothing that was paid for depends on it.

        Raises:
            StoreError: the store failed, or does not allow it.
        """
        self.objects.delete(key)

    def read_document(self, key: str) -> tuple[bytes, str] | None:
        """Return a document and its tag, or None where there is none."""
        return self.objects.read(key)

    def compare_and_swap(self, key: str, data: bytes, tag: str | None) -> str:
        """Write a JSON document if it still has this tag, or (None) if there is none yet; return the new tag.

        Raises:
            ConflictError: somebody else wrote it, or this very write did and its first answer was lost.
            NoAnswerError: it may have been written or not: read it back.
            StoreError: it was not written.
        """
        expected = Condition.NOTHING if tag is None else tag
        return self.objects.write(key, lambda: io.BytesIO(data), Facts("application/json"), expected)

    def uri(self, key: str) -> str:
        """Return the address of an object of this store: `file:///...` or `s3://bucket/prefix/...`."""
        return self.objects.uri(key)

    def public_url(self, uri: str) -> str | None:
        """Return where the public finds an object of this store; None without `public_base_url`."""
        return f"{self.public_base_url}/{quote(self.objects.key(uri))}" if self.public_base_url else None

    def presign(self, uri: str, seconds: int = 3600) -> str:
        """Return an address that lets anyone read the object for `seconds` (at most 7 days), signed by this machine.

        Raises:
            StoreError: a local folder can't sign, the object is not in this store, there are no credentials.
        """
        if not 1 <= seconds <= 604_800:
            raise StoreError(f"a signed address lives from 1 to 604,800 seconds, not {seconds}")
        return self.objects.presign(self.objects.key(uri), seconds)

    def beside(self, uri: str) -> ImageStore:
        """Return a store with these settings that holds `uri`, which may be below another folder or bucket."""
        place = split_at(uri, IMAGES)
        if place is None or is_s3(uri) != is_s3(self.url):
            raise StoreError(f"{self.identity} can't read {uri}: name the store it came from (source)")
        return self.model_copy(update={"url": normalised(place[0])})

    def _facts(self, media_type: str, sha256: str, metadata: Mapping[str, str]) -> Facts:
        return Facts(
            media_type,
            self.cache_control,
            ascii_metadata({**metadata, "sha256": sha256}),
            storage_class=self.upload.storage_class,
        )

    def delivered_facts(self, media_type: str, sha256: str, metadata: Mapping[str, str], key: str) -> Facts:
        """Return the facts that are kept beside a delivered object."""
        return replace(
            self._facts(media_type, sha256, metadata),
            disposition=self.upload.disposition(key),
            tags=self.upload.tags,
            acl=self.upload.acl,
        )


def _told(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
