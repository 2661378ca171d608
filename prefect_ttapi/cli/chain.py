"""The links of a chain from an image to its origin: small models that are JSON as well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from prefect_ttapi.ledger.documents import Payment
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.responses import Generation, StoredImage


class _Link(BaseModel):
    model_config = ConfigDict(frozen=True)


class Copy(_Link):
    """A delivered copy that was asked about, and its own metadata.

    Attributes:
        uri: its address.
        size_bytes: its length.
        metadata: decoded; nobody vouches for it.
    """

    uri: str
    size_bytes: int
    metadata: dict[str, str]


class Entry(_Link):
    """A request's document in the ledger.

    Attributes:
        uri: address of its document.
        state: `claimed`, `generated`, `released` or `unknown`.
        run_id: the run that paid, where there is an answer.
        generation: the answer: request, images, usage, runs.
        maybe_paid, also_paid: other payments for it.
    """

    uri: str
    state: str
    run_id: str | None = None
    generation: Generation | None = None
    maybe_paid: tuple[Payment, ...] = ()
    also_paid: tuple[Payment, ...] = ()


class SourceRow(_Link):
    """A row of a manifest, which says what was asked for and where its images were delivered."""

    manifest_uri: str
    row: Row


class Origin(_Link):
    """Who made an image, or what became of a request.

    Attributes:
        address: what was asked about.
        request_hash: the request's name, where it could be found.
        delivered: the delivered copy that was asked about, where it is one.
        image: the stored image that was asked about.
        image_is_there: whether the store has it with the recorded length.
        entries: what the ledger says of the request; several where more than one API was asked.
        rows: manifest rows of the request, that of the delivered copy first.
        gaps: what could not be found, a line each.
    """

    address: str
    request_hash: str | None = None
    delivered: Copy | None = None
    image: StoredImage | None = None
    image_is_there: bool | None = None
    entries: tuple[Entry, ...] = ()
    rows: tuple[SourceRow, ...] = ()
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """All images that a run made.

    Attributes:
        run_id: the flow run.
        manifests: addresses of its batches' manifests; none for a run without a batch.
        rows: a row for each request, read as they are asked for, once.
    """

    run_id: str
    manifests: tuple[str, ...]
    rows: Iterable[SourceRow]
