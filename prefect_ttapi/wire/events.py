"""What the events of an image stream say (sans-IO). Fields may be missing; what is unknown is passed over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from prefect_ttapi.wire.json_stream import DecodingError, StreamingJSON
from prefect_ttapi.wire.payload import ErrorBody, find_error
from prefect_ttapi.wire.sse import EventEnd, EventStream

_DONE: Final = b"[DONE]"
_NO_WORDS: Final = {"error": "the stream reports an error"}


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


class EventReader:
    """Reads the events of a stream that is fed in pieces of any size.

    Args:
        max_bytes: the longest event accepted; a longer one is passed over.

    >>> reader = EventReader(1000)
    >>> [event.kind.value for event in reader.feed(b'event: completed\\ndata: {"b64_json": "aW0="}\\n\\n')]
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
    """By its type, else by the event's name; without either, only the finished image has counted tokens."""
    ends = [str(label).rpartition(".")[2] for label in (document.get("type"), name)]
    if Kind.ERROR in ends:
        return Kind.ERROR
    if not (document.get("b64_json") or document.get("url")):
        return Kind.OTHER
    known = [Kind(end) for end in ends if end in (Kind.PARTIAL, Kind.COMPLETED)]
    return known[0] if known else Kind.COMPLETED if document.get("usage") else Kind.PARTIAL
