"""From the pieces of an image stream to previews and finished images, as they come (sans-IO).

Fields may be missing; what is unknown is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any, Final

from prefect_ttapi.api.json_stream import DecodingError, StreamingJSON
from prefect_ttapi.api.outcomes import BrokenOff, ErrorBody
from prefect_ttapi.api.payload import Answer, UnusableAnswer, find_error, read_answer, read_body
from prefect_ttapi.api.sse import EventEnd, EventStream
from prefect_ttapi.results import PartialImage

log: Final = logging.getLogger(__name__)

_DONE: Final = b"[DONE]"
_NO_WORDS: Final = {"error": "the stream reports an error"}


def read_stream(
    chunks: Iterator[bytes], media_type: str, most: int, max_bytes: int
) -> Iterator[PartialImage | Answer]:
    """Yield previews, and each finished image as an answer of its own.

    A server that answers all at once although it was asked to stream gives one answer. What breaks off after an image
    was finished does no harm.

    Args:
        chunks: the body's bytes as they arrive.
        media_type: what the answer says it is.
        most: finished images after which the rest of the stream does not matter.
        max_bytes: the longest event, and the longest answer of a server that does not stream.

    Raises:
        BrokenOff: from `chunks`.
        DecodingError, UnusableAnswer, OSError: as `read_body`.
    """
    first = next(chunks, b"")
    chunks = chain([first], chunks)
    # whatever its type is said to be: no event begins with a bracket
    if first.lstrip().startswith(b"{") or media_type.endswith("json"):
        yield read_body(chunks, max_bytes)
        return
    finished = previews = 0
    try:
        for event in _events(chunks, max_bytes):
            if event.error is not None:
                raise UnusableAnswer(event.error.message, event.error)
            if event.kind is Kind.DONE:
                break
            if event.kind is Kind.PARTIAL and (preview := _preview(event, previews)) is not None:
                yield preview
                previews += 1
            elif event.kind is Kind.COMPLETED:
                yield read_answer({"data": [event.document], "usage": event.document.get("usage")})
                finished += 1
                if finished == most:
                    return
    except (BrokenOff, DecodingError, OSError):
        if not finished:
            raise
    if not finished:
        raise UnusableAnswer("the stream ended before its image was finished")


class Kind(StrEnum):
    """What an event is; the values are the ends of the names that events carry."""

    PARTIAL = "partial_image"
    COMPLETED = "completed"
    ERROR = "error"
    DONE = "done"
    OTHER = "other"


@dataclass(frozen=True)
class ImageEvent:
    """One event; `document` is its JSON object, `error` what went wrong where the event says so."""

    kind: Kind
    document: Mapping[str, Any]
    error: ErrorBody | None = None


def _events(chunks: Iterator[bytes], max_bytes: int) -> Iterator[ImageEvent]:
    """Yield the stream's events; those that came whole before it broke off, too."""
    reader = EventReader(max_bytes)
    try:
        for chunk in chunks:
            yield from reader.feed(chunk)
    except (BrokenOff, DecodingError):
        yield from reader.finish()
        raise
    yield from reader.finish()


def _preview(event: ImageEvent, count: int) -> PartialImage | None:
    """Return the preview, or None where it is no image: it must not cost the image that is being paid for."""
    try:
        image = read_answer({"data": [event.document]}).items[0].image
    except UnusableAnswer as error:
        log.debug("a preview is no image: %s", error)
        return None
    if image is None:
        return None
    index = event.document.get("partial_image_index")
    return PartialImage(image[0], image[1].media_type, index if type(index) is int else count)


class EventReader:
    r"""Reads the events of a stream that is fed in pieces of any size.

    Args:
        max_bytes: the longest event accepted; a longer one is passed over.

    >>> reader = EventReader(1000)
    >>> [event.kind.value for event in reader.feed(b'event: completed\ndata: {"b64_json": "aW0="}\n\n')]
    ['completed']
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._stream = EventStream()
        self._next_event()

    def _next_event(self) -> None:
        self._head = b""  # as much as tells [DONE] from JSON
        self._json: StreamingJSON | None = None
        self._broken = False

    def feed(self, chunk: bytes) -> Iterator[ImageEvent]:
        """Take the next piece of the stream.

        Raises:
            OSError: a spool file can't be written.
        """
        for part in self._stream.feed(chunk):
            if isinstance(part, EventEnd):
                yield self._event(part.name)
            elif not self._broken:
                self._take(part)

    def finish(self) -> Iterator[ImageEvent]:
        """Tell that the stream is over: a last event that is whole but for its empty line counts."""
        for part in self._stream.finish():
            yield self._event(part.name)

    def _take(self, piece: bytes) -> None:
        if self._json is None:
            head = (self._head + piece).lstrip()
            if _DONE.startswith(head) or head.rstrip() == _DONE:
                self._head = head[: len(_DONE)]
                return
            self._json = StreamingJSON(max_bytes=self._max_bytes)
            piece = head
        try:
            self._json.feed(piece)
        except DecodingError:
            self._broken = True

    def _event(self, name: str) -> ImageEvent:
        document = self._document()
        done = self._json is None and self._head == _DONE
        self._next_event()
        if done:
            return ImageEvent(Kind.DONE, {})
        error = find_error(document)
        kind = Kind.ERROR if error else _kind(document, name)
        if kind is Kind.ERROR and error is None:
            error = find_error({**document, "status": "FAILED"} if document else _NO_WORDS)
        return ImageEvent(kind, document, error)

    def _document(self) -> Mapping[str, Any]:
        try:
            document = None if self._json is None or self._broken else self._json.finish()
        except DecodingError:
            document = None
        return document if isinstance(document, Mapping) else {}


def _kind(document: Mapping[str, Any], name: str) -> Kind:
    """Tell by its type, else by the event's name; without either, only the finished image has counted tokens."""
    ends = [str(label).rpartition(".")[2] for label in (document.get("type"), name)]
    if Kind.ERROR in ends:
        return Kind.ERROR
    if not (document.get("b64_json") or document.get("url")):
        return Kind.OTHER
    known = [Kind(end) for end in ends if end in (Kind.PARTIAL, Kind.COMPLETED)]
    return known[0] if known else Kind.COMPLETED if document.get("usage") else Kind.PARTIAL
