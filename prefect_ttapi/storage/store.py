"""The block that says where images live, with the operations that the package needs there."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

from prefect.blocks.core import Block
from pydantic import ConfigDict, SecretStr

from prefect_ttapi.errors import StoreError
from prefect_ttapi.results import GeneratedImage, StoredImage
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.folder import Folder
from prefect_ttapi.storage.layout import IMAGES, image_key, is_s3, normalised, split_at
from prefect_ttapi.storage.objects import (
    Condition,
    Facts,
    Listed,
    ObjectStore,
    ascii_metadata,
    probe,
    waiting,
)
from prefect_ttapi.storage.settings import ConnectionOptions, NotMapped, StoreSettings, UploadOptions

#: Stores that this process has found to keep their promises; one thread asks, the others wait.
_probed: set[str] = set()
_probing = threading.Lock()


class ImageStore(NotMapped, StoreSettings, Block):
    """Where images live: a local folder or an S3 bucket, with the ledger of what was paid for beside them.

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
    _description = (
        "This block keeps generated images in a folder or an S3 bucket, and remembers what was paid for."
    )

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

        4 small requests, 5 the first time; what stays is `ledger/probe.json`.

        Raises:
            StoreError: what is wrong, and what to do, in one line.
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
            metadata: kept beside the object on S3; what is not ASCII is percent-encoded, what is too long is
            cut.
        """
        key = image_key(image.sha256, image.media_type)
        # without a look first: a fresh image is hardly ever there, and a look costs as much as the ledger's writes
        self.objects.write(key, image.open, self._facts(image.media_type, image.sha256, metadata))
        return self.reference(image)

    def reference(self, image: GeneratedImage) -> StoredImage:
        """Return the reference that `put_image` gives for an image, whether it is there or not."""
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
        """Remove an object; one that is not there is none to remove.

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
        """Return what is kept beside a delivered object."""
        return replace(
            self._facts(media_type, sha256, metadata),
            disposition=self.upload.disposition(key),
            tags=self.upload.tags,
            acl=self.upload.acl,
        )
