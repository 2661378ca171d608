"""What comes back: references that pass between tasks, and images fresh from the wire.

`Generation`, `StoredImage` and `DeliveredImage` are small, JSON-able and hold no image bytes.
`GeneratedImages` and the events of a stream hold bytes in temporary files and stay in their process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, BinaryIO, Final, Protocol

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from prefect_ttapi.errors import Outcome
from prefect_ttapi.images.labels import Mark, read_labels
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.requests import ImageRequest

#: The version of the package: what `pyproject.toml` builds, and what records and objects say made them.
VERSION: Final = "0.1.0"

_CHUNK: Final = 64 * 1024


class Usage(BaseModel):
    """Tokens as the API counted them; unknown fields are kept.

    A count that can't be read is taken for not given: it must not cost the images that it came with.

    Attributes:
        input_tokens: of the prompt.
        output_tokens: of the images.
        total_tokens: of both.
        input_tokens_details, output_tokens_details: what the API says of their kinds.

    >>> Usage.model_validate({"input_tokens": 9, "output_tokens": 4160, "total_tokens": 4169}).total_tokens
    4169
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    input_tokens: int = Field(default=0, ge=0)
    output_tokens: int = Field(default=0, ge=0)
    total_tokens: int = Field(default=0, ge=0)
    input_tokens_details: dict[str, Any] | None = None
    output_tokens_details: dict[str, Any] | None = None

    @field_validator("*", mode="wrap")
    @classmethod
    def _forgive(cls, given: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(given)
        except ValidationError:
            return cls.model_fields[str(info.field_name)].default


class StoredImage(BaseModel):
    """One image in the store, named by its content.

    Attributes:
        uri: `file:///...` or `s3://bucket/prefix/images/<sha256>.<ext>`.
        sha256: hex digest of the bytes.
        size_bytes: length of the object.
        media_type: read from the bytes: of PNG, JPEG or WebP as a rule, of GIF, BMP or AVIF where such came.
        width, height: pixels, read from the bytes.
        index: position in the answer, from 0.
        revised_prompt: the prompt as the model rewrote it, where it says so.
        marks: what the file says of where it comes from: `credentials` (Content Credentials, valid or not), `xmp` (an
            XMP packet that says that a model made it), `prompt` (the packet has the prompt, too); None where nobody
            looked: in records of earlier versions, and for GIF, BMP and AVIF.
        signature: who signed the file's Content Credentials, and whether they are valid, in words; in rows only, of a
            batch with thumbnails and the extra `provenance`.
    """

    model_config = ConfigDict(frozen=True)

    uri: str
    sha256: str
    size_bytes: int
    media_type: str
    width: int
    height: int
    index: int
    revised_prompt: str | None = None
    marks: tuple[Mark, ...] | None = None
    signature: str | None = None


class Generation(BaseModel):
    """One request's answer: where its images are and what they cost.

    Attributes:
        request: what was asked.
        request_hash: the request's name for ever.
        api_origin: who answered, e.g. `https://api.ttapi.io`.
        created_at: when the answer was recorded, UTC.
        images: in the order of the answer.
        usage: tokens, where the API counted them.
        api_calls: how often the request was sent for this answer.
        seconds: from the first attempt to the recorded answer.
        flow_run_id, task_run_id: the Prefect runs that paid, where there were any.
        request_id: the API's id of the call, where it sent one.
        earlier_outcomes: what became of the sends before the answered one; some of these may be paid, too.
        package_version: of the prefect-ttapi that recorded the answer.
    """

    model_config = ConfigDict(frozen=True)

    request: ImageRequest
    request_hash: str
    api_origin: str
    created_at: datetime
    images: tuple[StoredImage, ...]
    usage: Usage | None = None
    api_calls: int = 1
    seconds: float = 0.0
    flow_run_id: str | None = None
    task_run_id: str | None = None
    request_id: str | None = None
    earlier_outcomes: tuple[Outcome, ...] = ()
    package_version: str | None = None


class Presigns(Protocol):
    """A store that can sign an object's address."""

    def presign(self, uri: str, seconds: int) -> str:
        """Return an address of the object at `uri` that works for `seconds`."""


class DeliveredImage(BaseModel):
    """One image under the name its consumers know.

    Attributes:
        uri: `file:///...` or `s3://bucket/key`.
        url: public address, where the store has a `public_base_url`.
        sha256: hex digest of the bytes.
        source_uri: the stored image it is a copy or a rendition of.
        source_sha256: hex digest of that image, which a copy with a mark of its own does not have.
        size_bytes: length of the object.
        media_type: as in `StoredImage`.
        width, height: pixels.
        rendition: the rendition's name; None for a copy.
        recipe: how the rendition was made: format, longest side, quality.
        marks: as in `StoredImage`.
        signer: where the file was signed for this delivery, a digest of the signer's name and of its authority's.
        etag: changes with every write to the object: while a listing shows the same, the copy stands.
    """

    model_config = ConfigDict(frozen=True)

    uri: str
    url: str | None = None
    sha256: str
    source_uri: str
    source_sha256: str | None = None
    size_bytes: int | None = None
    media_type: str | None = None
    width: int | None = None
    height: int | None = None
    rendition: str | None = None
    recipe: str | None = None
    marks: tuple[Mark, ...] | None = None
    signer: str | None = None
    etag: str | None = None

    def presign(self, store: Presigns, seconds: int = 3600) -> str:
        """Return a signed address that works for `seconds`; never kept in results, manifest or ledger.

        Raises:
            StoreError: the store can't sign (a local folder), or the object is not in it.
        """
        return store.presign(self.uri, seconds)


@dataclass(frozen=True)
class _HasBytes:
    spool: Spool = field(repr=False)
    media_type: str

    def open(self) -> BinaryIO:
        """Return a new reader over the image's bytes."""
        return self.spool.open()

    def read_bytes(self) -> bytes:
        """Return the image's bytes, all in memory."""
        return self.spool.read_bytes()


@dataclass(frozen=True)
class GeneratedImage(_HasBytes):
    """One image fresh from the wire; type and size are read from its bytes (pixels, bytes)."""

    width: int
    height: int
    index: int
    revised_prompt: str | None = None

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the bytes."""
        return self.spool.sha256

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.spool.size_bytes

    @property
    def marks(self) -> tuple[Mark, ...] | None:
        """What the bytes say of where they come from; None for kinds of files in which nobody looks."""
        with self.open() as file:
            labels = read_labels(file)
        return labels.marks if labels else None


@dataclass(frozen=True)
class GeneratedImages:
    """The answer to one request; its images outlive the client.

    Attributes:
        images: in the order of the answer; there may be fewer than `n`.
        usage: tokens, where the API counted them.
        created: the API's own time stamp, Unix seconds, where it sent one.
        attempts: how often the request was sent.
        seconds: from the first attempt to the complete answer.
        request_id: the API's id of the call, where it sent one.
        earlier_outcomes: what became of the sends before the answered one, of which some may be paid, too.
        rest: the whole answer, where not all of its URLs could be fetched: for `TTAPIClient.read_again`.
    """

    images: tuple[GeneratedImage, ...]
    usage: Usage | None = None
    created: int | None = None
    attempts: int = 1
    seconds: float = 0.0
    request_id: str | None = None
    earlier_outcomes: tuple[Outcome, ...] = ()
    rest: RawAnswer | None = None


@dataclass(frozen=True)
class RawAnswer:
    """What is in hand of an answer that was paid for and did not give all its images: it keeps these from being lost.

    Attributes:
        body: the answer's body as it came, or as much of it as came, with its content encoding undone.
        media_type: what the answer says that it is; perhaps empty.
        request_id: the API's id of the call, where it sent one.
    """

    body: Spool = field(repr=False)
    media_type: str
    request_id: str | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield the body piece by piece."""
        with self.body.open() as file:
            while chunk := file.read(_CHUNK):
                yield chunk


@dataclass(frozen=True)
class PartialImage(_HasBytes):
    """A preview from a stream; `index` counts previews from 0. Events never tell of which of n images."""

    index: int


@dataclass(frozen=True)
class CompletedImage(GeneratedImage):
    """A finished image from a stream, with the tokens it took where the API says so.

    `attempts`, `request_id` and `earlier_outcomes` are as in `GeneratedImages`, the same for all images of a stream.
    """

    usage: Usage | None = None
    attempts: int = 1
    request_id: str | None = None
    earlier_outcomes: tuple[Outcome, ...] = ()
