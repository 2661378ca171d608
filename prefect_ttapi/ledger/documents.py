"""The ledger's documents, one for each request and API origin: what they say, and how they are read and replaced.

Each is look-up, claim and record in one, and is replaced only on the precondition that it still has the etag with
which it was read. `token` and `sequence` name the write that made it, so that a writer who lost the store's answer
recognises their own write when they read it back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from prefect_ttapi.errors import StoreError, printable
from prefect_ttapi.images.headers import EXTENSIONS
from prefect_ttapi.results import Generation, Usage
from prefect_ttapi.storage.layout import (
    document_in,
    image_key,
    is_sha256,
    ledger_folder,
    ledger_key,
    origin_of_slug,
    slug_of,
)
from prefect_ttapi.storage.objects import ConflictError, NoAnswerError, patience
from prefect_ttapi.storage.store import ImageStore

#: Where it is told what is waited for, taken over, sent again.
Log = logging.Logger | logging.LoggerAdapter[Any]

#: Seconds. Nobody waits longer than this for a claim, whatever a document says.
LONGEST_TTL: Final = 3600.0

#: Characters kept of an error's message.
_LONGEST_TEXT: Final = 500


class State(StrEnum):
    """What became of a request. There is no state for "absent": that is no document."""

    CLAIMED = "claimed"  # somebody is about to send it, or has
    GENERATED = "generated"  # its images are stored
    RELEASED = "released"  # claimed once, surely not paid for
    UNKNOWN = "unknown"  # sent, perhaps paid for, no images


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds control characters")
    return text


#: What ends up in logs: one line of bounded length.
Line = Annotated[str, Field(max_length=600), AfterValidator(_printable)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Payment(_Part):
    """A payment that may have been made, or was made in vain.

    Attributes:
        token: the claim it was made under.
        run_id: the run that sent the request.
        when: when that was noted, UTC.
        what: what is known of it, in words.
        found_by: the run that found its claim dead, where one did.
    """

    token: Line
    run_id: Line
    when: AwareDatetime
    what: Line
    found_by: Line | None = None


class Holder(_Part):
    """Who holds a claim. `place` names host, boot and process namespace, where the system tells them.

    `reads` says that it only has the rest of an answer that is recorded: nothing is sent under its claim.
    """

    run_id: Line
    host: Line
    place: Line | None
    pid: int = Field(gt=0)
    started: int
    reads: Literal[True] | None = None


class Answer(_Part):
    """Images that were paid for, without addresses: these follow from the store and the SHA-256."""

    token: Line
    run_id: Line
    generation: dict[str, Any]
    result_key: str | None = None


class Kept(Answer):
    """An answer that was paid for and that nobody can read yet; its body is in the store as it came.

    Attributes:
        token: names the body, too.
        generation: all that is known of it: no images yet.
        when: when it came, UTC.
        why: why it could not be read.
        whole: it came to its end, and nothing of it was had; nothing is sent while such an answer can't be read.
        media_type, size_bytes, sha256: of the body.
    """

    token: str = Field(pattern="^[0-9a-f]{32}$")
    when: AwareDatetime
    why: Line
    whole: bool
    media_type: Line
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Cost(_Part):
    """What an answer cost. That of one which is the record no longer is kept.

    Attributes:
        token: the claim that it was paid for under.
        run_id: the run that paid.
        flow_run_id: that run's flow run, where there was one.
        created_at: when it was answered.
        model: who answered.
        images: how many it had.
        api_calls: how often it was sent.
        earlier_outcomes: what became of the sends before the answered one.
        usage: tokens, where the API counted them.
    """

    token: Line
    run_id: Line
    flow_run_id: Line | None = None
    created_at: AwareDatetime
    model: Line
    images: int
    api_calls: int
    earlier_outcomes: tuple[Line, ...] = ()
    usage: Usage | None = None

    @classmethod
    def of(cls, answer: Answer) -> Self:
        """Return what an answer cost. ValueError: it does not say so."""
        made = answer.generation
        who = {"token": answer.token, "run_id": answer.run_id}
        what = {"model": made.get("request", {}).get("model"), "images": len(made.get("images", ()))}
        return cls.model_validate(made | who | what)


class Document(_Part):
    """What stands in the store under a request's hash.

    A claim or an unknown outcome may have an `answer` too: a refresh keeps the old one, and others go on
    using it. `replaced` says what answers cost that are the record no longer: they were paid for anew, or their
    images are lost. Format 2 has answers that are kept unread: a version that does not know of them must not pay anew.
    """

    format: Literal[1, 2] = 1
    request_hash: str
    api_origin: str
    state: State
    token: Line
    sequence: int
    holder: Holder | None = None
    ttl: float = Field(default=LONGEST_TTL, gt=0, le=LONGEST_TTL)
    answer: Answer | None = None
    maybe_paid: tuple[Payment, ...] = ()
    also_paid: tuple[Payment, ...] = ()
    kept: tuple[Kept, ...] = ()
    replaced: tuple[Cost, ...] = ()

    @property
    def costs(self) -> tuple[Cost, ...]:
        """What all answers cost that are or were the record, the last one last. ValueError: one does not say so."""
        return (*self.replaced, *([Cost.of(self.answer)] if self.answer else []))


class Record(_Part):
    """What the ledger knows of a request whose images are stored.

    Attributes:
        generation: the images and what they cost.
        state: `generated`, or `claimed` while somebody refreshes it.
        run_id: the run that paid.
        result_key: an opaque text that was recorded with it.
        rest: the whole answer, where not all of its images could be had yet.
        maybe_paid: earlier sends whose outcome nobody knows.
        also_paid: other answers to the same request, paid for and not used.
        tag, size: of the stored document, as a listing of the store shows them.
    """

    generation: Generation
    state: State
    run_id: str
    result_key: str | None = None
    rest: Kept | None = None
    maybe_paid: tuple[Payment, ...] = ()
    also_paid: tuple[Payment, ...] = ()
    tag: str | None = None
    size: int | None = None


def encode(document: Document) -> bytes:
    """Return the document as it is stored: JSON."""
    versioned = document.model_copy(update={"format": 2 if document.kept else 1})
    return versioned.model_dump_json(exclude_none=True).encode()


def decode(data: bytes, request_hash: str, api_origin: str) -> Document:
    """Return a stored document.

    Raises:
        ValueError: it is no document of this request, or of a format this version does not know.
    """
    try:
        document = Document.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        if where == "format":
            raise ValueError("was written by a newer version of this package: upgrade") from None
        raise ValueError(f"is no ledger record ({where + ': ' if where else ''}{problem['msg']})") from None
    if (document.request_hash, document.api_origin) != (request_hash, api_origin):
        raise ValueError("is the record of another request or API")
    if document.state is State.CLAIMED and document.holder is None:
        raise ValueError("is a claim without a holder")
    if document.state is State.GENERATED and document.answer is None:
        raise ValueError("says generated but names no images")
    return document


def generation_of(facts: dict[str, Any], request_hash: str, store: ImageStore) -> Generation:
    """Return the generation of an answer, with its images where `store` keeps them.

    Raises:
        ValueError: it is no generation of this request.
    """
    try:
        images = [_placed(image, store) for image in facts["images"]]
        generation = Generation.model_validate({**facts, "images": images})
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ValueError(f"holds no generation ({type(error).__name__})") from None
    named = {generation.request_hash, generation.request.request_hash}
    if named != {request_hash} or generation.created_at.tzinfo is None:
        raise ValueError("holds the generation of another request")
    return generation


def facts_of_generation(generation: Generation) -> dict[str, Any]:
    """Return what there is to record of a generation: all but what follows from the store that it is recorded in."""
    return generation.model_dump(mode="json", exclude={"images": {"__all__": {"uri"}}}, exclude_none=True)


def _placed(image: dict[str, Any], store: ImageStore) -> dict[str, Any]:
    sha256, media_type = image["sha256"], image["media_type"]
    if not is_sha256(sha256) or media_type not in EXTENSIONS:
        raise ValueError("names an image that can't be")
    return {**image, "uri": store.uri(image_key(sha256, media_type))}


def record_of(document: Document, store: ImageStore) -> Record | None:
    """Return what `document` says of stored images; None where it has none. ValueError: they make no sense."""
    if document.answer is None:
        return None
    return Record(
        generation=generation_of(document.answer.generation, document.request_hash, store),
        state=document.state,
        run_id=document.answer.run_id,
        result_key=document.answer.result_key,
        rest=rest_of(document),
        maybe_paid=document.maybe_paid,
        also_paid=document.also_paid,
    )


def rest_of(document: Document) -> Kept | None:
    """Return the recorded answer as it came, where not all of its images could be had yet."""
    answer = document.answer
    return next((kept for kept in document.kept if answer and kept.token == answer.token), None)


def line_of(text: str) -> str:
    """Return a text on one line and of bounded length."""
    return printable(text)[:_LONGEST_TEXT]


def payment(token: str, run_id: str, what: str, found_by: str | None = None) -> Payment:
    """Return a note of a payment, made now."""
    return Payment(token=token, run_id=run_id, when=datetime.now(UTC), what=line_of(what), found_by=found_by)


@dataclass(frozen=True)
class Seen:
    """A document, the tag it had when it was read or written, and its length in bytes."""

    document: Document
    tag: str
    size: int


@dataclass(frozen=True)
class Swap:
    """What became of a write: `seen` is the own document if it was `won`, else what stands instead."""

    won: bool
    seen: Seen | None


class Documents:
    """The documents of one API origin in a store, at `ledger/<origin>/<request hash>.json`."""

    def __init__(self, store: ImageStore, api_origin: str) -> None:
        self.store = store
        self.api_origin = api_origin
        self.prefix = ledger_folder(api_origin)

    def key(self, request_hash: str) -> str:
        """Return where the request's document is. StoreError: that is no request hash."""
        if not is_sha256(request_hash):
            raise StoreError(f"{request_hash[:80]!a} is no request hash: it must be 64 hexadecimal digits")
        return ledger_key(slug_of(self.api_origin), request_hash)

    def read(self, request_hash: str) -> Seen | None:
        """Return the document as it stands. StoreError: the store fails, or holds something that makes no sense."""
        key = self.key(request_hash)
        found = self.store.read_document(key)
        if found is None:
            return None
        data, tag = found
        try:
            return Seen(decode(data, request_hash, self.api_origin), tag, len(data))
        except ValueError as error:
            raise self._senseless(key, error) from None

    def record(self, seen: Seen) -> Record | None:
        """Return what the document says of stored images, or None. StoreError: it makes no sense."""
        try:
            record = record_of(seen.document, self.store)
        except ValueError as error:
            raise self._senseless(self.key(seen.document.request_hash), error) from None
        return record and record.model_copy(update={"tag": seen.tag, "size": seen.size})

    def swap(self, document: Document, tag: str | None) -> Swap:
        """Put `document` in the place of the one with `tag`, or (None) of none.

        A lost answer is settled by reading back: the own token and sequence mean won, an unchanged tag means
        that it is to be sent again, anything else means lost.

        Raises:
            NoAnswerError: the store stays silent; it may hold the document or not.
            StoreError: the store refuses.
        """
        key, data = self.key(document.request_hash), encode(document)

        def attempt() -> Swap:
            try:
                return Swap(True, Seen(document, self.store.compare_and_swap(key, data, tag), len(data)))
            except (ConflictError, NoAnswerError) as error:
                trouble = str(error)  # the error itself would keep its caller's claim alive
            found = self.read(document.request_hash)
            if found is None:
                if tag is not None:
                    return Swap(False, None)
            elif _write_of(found.document) == _write_of(document):
                return Swap(True, found)
            elif found.tag != tag:
                return Swap(False, found)
            raise NoAnswerError(f"{self.store.uri(key)}: can't be written ({trouble})")

        return patience().ask(attempt)

    def _senseless(self, key: str, error: ValueError) -> StoreError:
        return StoreError(
            f"{self.store.uri(key)} {error}; nothing is sent while it stands: look, and delete it to pay anew"
        )


def _write_of(document: Document) -> tuple[str, int]:
    return document.token, document.sequence


def documents_at(store: ImageStore, key: str) -> tuple[Documents, str]:
    """Return where a ledger document's key is read and written, and its request hash. ValueError: it is no such key."""
    folder, request_hash = document_in(key) or ("", "")
    return Documents(store, origin_of_slug(folder)), request_hash
