"""Images from server-sent events: previews and finished images, as they come (sans-IO).

Events are framed as the WHATWG says. An event's data is handed on as it arrives, so that an event of 64 MiB costs no
memory here. Lines end with LF, CR or CRLF; one byte-order mark is skipped; comments, `id`, `retry` and unknown fields
mean nothing to us. In what the events say fields may be missing; what is unknown is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any, Final

from prefect_ttapi.api.json_stream import DecodingError, StreamingJSON
from prefect_ttapi.api.outcomes import BrokenOff
from prefect_ttapi.api.payload import Answer, UnusableAnswer, find_error, read_answer, read_body
from prefect_ttapi.results import PartialImage

log: Final = logging.getLogger(__name__)

_BOM: Final = b"\xef\xbb\xbf"
_DATA: Final = b"data:"
_LONGEST_FIELD: Final = 1024  # bytes of a line other than data that are looked at

_DONE: Final = b"[DONE]"
_LONGEST_DONE: Final = 64  # bytes of an event's data that are kept to tell _DONE, with spaces, from JSON
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
        UnusableAnswer: the stream reports an error, or ends before an image was finished.
        DecodingError, OSError: as `read_body`.
    """
    first = next(chunks, b"")
    chunks = chain([first], chunks)
    # whatever its type is said to be: no event begins with a bracket
    if first.lstrip().startswith(b"{") or media_type.endswith("json"):
        yield read_body(chunks, max_bytes)
        return
    finished = previews = 0
    try:
        for kind, document in _events(chunks, max_bytes):
            if kind is Kind.PARTIAL and (preview := _preview(document, previews)) is not None:
                yield preview
                previews += 1
            elif kind is Kind.COMPLETED:
                yield read_answer({"data": [document], "usage": document.get("usage")})
                finished += 1
            if finished == most or kind is Kind.DONE:
                break
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


def _events(chunks: Iterator[bytes], max_bytes: int) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
    """Yield what each event is, and its JSON object.

    Raises:
        UnusableAnswer: the stream reports an error.
    """
    data = _Data(max_bytes)
    for part in _parts(chunks):
        if not isinstance(part, EventEnd):
            data.feed(part)
            continue
        document = data.document()
        kind, error = data.kind(document, part.name), find_error(document)
        if error is None and kind is Kind.ERROR:
            error = find_error({**document, "status": "FAILED"} if document else _NO_WORDS)
        if error is not None:
            raise UnusableAnswer(error.message, error)
        yield kind, document
        data = _Data(max_bytes)


def _parts(chunks: Iterator[bytes]) -> Iterator[bytes | EventEnd]:
    """Yield the stream's parts; the end of an event that came whole before the stream broke off, too."""
    stream = EventStream()
    try:
        for chunk in chunks:
            yield from stream.feed(chunk)
    except (BrokenOff, DecodingError):
        yield from stream.finish()
        raise
    yield from stream.finish()


def _preview(document: Mapping[str, Any], count: int) -> PartialImage | None:
    """Return the preview, or None where it is no image: it must not cost the image that is being paid for."""
    try:
        image = read_answer({"data": [document]}).items[0].image
    except UnusableAnswer as error:
        log.debug("a preview is no image: %s", error)
        return None
    if image is None:
        return None
    index = document.get("partial_image_index")
    return PartialImage(image[0], image[1].media_type, index if type(index) is int else count)


class _Data:
    """The data of one event; what is no JSON object, or longer than `max_bytes`, counts as an empty one."""

    def __init__(self, max_bytes: int) -> None:
        self._head = b""
        self._json: StreamingJSON | None = StreamingJSON(max_bytes=max_bytes)

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the data.

        Raises:
            OSError: a spool file can't be written.
        """
        if len(self._head) < _LONGEST_DONE:
            self._head += piece[:_LONGEST_DONE]
        try:
            if self._json is not None:
                self._json.feed(piece)
        except DecodingError:
            self._json = None

    def document(self) -> Mapping[str, Any]:
        """Return the JSON object."""
        try:
            document = None if self._json is None else self._json.finish()
        except DecodingError:
            document = None
        return document if isinstance(document, Mapping) else {}

    def kind(self, document: Mapping[str, Any], name: str) -> Kind:
        """Tell by its type, else by the event's name; without either, only the finished image has counted tokens."""
        if self._head.strip() == _DONE:
            return Kind.DONE
        ends = [str(label).rpartition(".")[2] for label in (document.get("type"), name)]
        if Kind.ERROR in ends:
            return Kind.ERROR
        if not (document.get("b64_json") or document.get("url")):
            return Kind.OTHER
        known = [Kind(end) for end in ends if end in (Kind.PARTIAL, Kind.COMPLETED)]
        return known[0] if known else Kind.COMPLETED if document.get("usage") else Kind.PARTIAL


@dataclass(frozen=True)
class EventEnd:
    """The end of an event, whose data are the pieces since the last one.

    Attributes:
        name: its `event` field, empty where it had none.
    """

    name: str


class EventStream:
    r"""Splits a stream into events. For each event come the pieces of its data, then its `EventEnd`.

    >>> stream = EventStream()
    >>> list(stream.feed(b"event: hi\ndata: on")) + list(stream.feed(b"e\r\ndata:two\r\n\r\n"))
    [b'on', b'e', b'\n', b'two', EventEnd(name='hi')]
    """

    def __init__(self) -> None:
        self._line = b""  # the start of a line that is not known to be data
        self._in_data = False
        self._after_cr = False
        self._first_line = True
        self._has_data = False
        self._name = ""

    def feed(self, chunk: bytes) -> Iterator[bytes | EventEnd]:
        """Take the next piece of the stream, of any size."""
        if not chunk:
            return
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        self._after_cr = chunk.endswith(b"\r")
        *ended, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for piece in ended:
            yield from self._take(piece)
            yield from self._end_line()
        yield from self._take(rest)

    def finish(self) -> Iterator[EventEnd]:
        """Tell that the stream is over.

        The rules drop an event without the empty line that ends it. Here it is up to its data whether it is
        whole: it may be a paid image.
        """
        if self._has_data:
            yield EventEnd(self._name)

    def _take(self, piece: bytes) -> Iterator[bytes]:
        """Hand on a piece of a line, once the line is known to be data."""
        if self._in_data:
            if piece:
                yield piece
            return
        self._line += piece
        if self._first_line and len(self._line) >= len(_BOM):
            self._line = self._line.removeprefix(_BOM)
            self._first_line = False
        if not self._line.startswith(_DATA):
            self._line = self._line[:_LONGEST_FIELD]
        elif len(self._line) > len(_DATA):  # the space that may come first is here
            yield from self._start_data()
            yield self._line[len(_DATA) :].removeprefix(b" ")

    def _start_data(self) -> Iterator[bytes]:
        if self._has_data:
            yield b"\n"
        self._has_data = self._in_data = True

    def _end_line(self) -> Iterator[bytes | EventEnd]:
        if not self._in_data:
            field, _, value = self._line.partition(b":")
            if field == b"data":  # and no more
                yield from self._start_data()
            elif field == b"event":
                self._name = value.removeprefix(b" ").decode(errors="replace")
            elif not self._line:
                if self._has_data:
                    yield EventEnd(self._name)
                self._name, self._has_data = "", False
        self._line, self._in_data, self._first_line = b"", False, False
