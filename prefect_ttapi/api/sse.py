"""Images from a 2xx's body, whatever it is: JSON, JSON Lines, server-sent events, an image (sans-IO).

What a body is, its first bytes say, not its type, nor what was asked for. Events are framed as the WHATWG says. An
event's data is handed on as it arrives, so that an event of 64 MiB costs no memory here. Lines end with LF, CR or CRLF;
one byte-order mark is skipped; comments, `id`, `retry` and unknown fields mean nothing to us. In what the events say
fields may be missing; what is unknown is passed over.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Final

from prefect_ttapi.api.json_stream import DecodingError, StreamingJSON
from prefect_ttapi.api.outcomes import BrokenOff
from prefect_ttapi.api.payload import (
    Answer,
    UnusableAnswer,
    find_error,
    has_images,
    is_bare,
    read_answer,
)
from prefect_ttapi.images.headers import media_type_of
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.results import PartialImage

log: Final = logging.getLogger(__name__)

_BOM: Final = b"\xef\xbb\xbf"
_DATA: Final = b"data:"
_LONGEST_FIELD: Final = 1024  # bytes of a line other than data that are looked at

_DONE: Final = b"[DONE]"
_LONGEST_DONE: Final = 64  # bytes of an event's data that are kept to tell _DONE, with spaces, from JSON
_NO_WORDS: Final = {"error": "the stream reports an error"}

_BEGINNING: Final = 64  # bytes, blanks aside, that tell what a body is
_MOST_BLANKS: Final = 4096
_FIELD: Final = re.compile(rb"(?:event|data|id|retry)?:")
_TEXT: Final = re.compile(rb"data:image/|https?://|iVBORw0KGgo|/9j/|R0lGOD|UklGR", re.IGNORECASE)

#: Documents, each with the name of its event; empty where it has none.
Documents = Iterator[tuple[str, object]]


def read_answers(
    chunks: Iterable[bytes], media_type: str, most: int, max_bytes: int, *, streamed: bool = True
) -> Iterator[PartialImage | Answer]:
    """Yield previews, and finished images as they come, in one or more answers.

    What is wrong with the body does no harm once there is an image: it is a problem of a last answer without images.

    Args:
        chunks: the body's bytes as they arrive.
        media_type: what the answer says it is.
        most: finished images after which the rest of a stream does not matter.
        max_bytes: the longest event, or body that is no stream.
        streamed: a stream was asked for, so that an image without a word beside it is a preview.

    Raises:
        BrokenOff, DecodingError, UnusableAnswer, OSError: no image was finished.
    """
    is_stream, documents = _recognised(chunks, media_type, max_bytes)
    finished = previews = 0
    wrong: list[Exception] = []  # and no variable: raised, it would keep this frame, and the images, alive
    try:
        for name, document in documents:
            kind = _kind(document, name, streamed and is_stream)
            if kind is Kind.ERROR:
                raise _reported(document)
            if kind is Kind.PARTIAL:
                preview = _preview(document, previews)
                if preview is not None:
                    yield preview
                    previews += 1
            elif kind is Kind.COMPLETED or not is_stream:
                try:
                    answer = read_answer(document)
                except UnusableAnswer as error:
                    wrong = wrong or [error]
                    continue
                yield answer
                finished += len(answer.items)
            if is_stream and finished >= most:
                break
    except (BrokenOff, DecodingError, UnusableAnswer, OSError) as error:
        wrong = [error]
    if not finished:
        raise wrong.pop() if wrong else UnusableAnswer("the stream ended before its image was finished")
    if wrong:
        yield Answer((), problems=(str(wrong[0]),))


def read_answer_of(chunks: Iterable[bytes], media_type: str, most: int, max_bytes: int) -> Answer:
    """Return all images of a body that was not asked to be a stream.

    Raises:
        BrokenOff, DecodingError, UnusableAnswer, OSError: it has none.
    """
    parts = [
        part
        for part in read_answers(chunks, media_type, most, max_bytes, streamed=False)
        if isinstance(part, Answer)
    ]
    return Answer(
        items=tuple(item for part in parts for item in part.items),
        usage=next((part.usage for part in reversed(parts) if part.usage), None),
        created=next((part.created for part in parts if part.created is not None), None),
        problems=tuple(problem for part in parts for problem in part.problems),
    )


def _recognised(chunks: Iterable[bytes], media_type: str, max_bytes: int) -> tuple[bool, Documents]:
    """Return whether a body is a stream of events, and its documents."""
    head, chunks = _peeked(iter(chunks))
    if media_type_of(head) is not None:
        return False, _image(chunks, max_bytes)
    told = head.removeprefix(_BOM).lstrip()
    if _TEXT.match(told):  # an image or its URL, and no JSON around it
        return False, _documents(chain([b'"'], chunks, [b'"']), max_bytes)
    if _FIELD.match(told) or (media_type == "text/event-stream" and not told.startswith((b"{", b"[", b'"'))):
        return True, _events(chunks, max_bytes)
    return False, _documents(chunks, max_bytes)


def _peeked(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return how a body begins, and all of it."""
    head = b""
    broke: list[Exception] = []
    try:
        for chunk in chunks:
            head += chunk
            if len(head.lstrip()) >= _BEGINNING or len(head) > _MOST_BLANKS:
                break
    except (BrokenOff, DecodingError) as error:
        broke = [error]

    def whole() -> Iterator[bytes]:
        yield head
        if broke:
            raise broke.pop()
        yield from chunks

    return head, whole()


def _image(chunks: Iterable[bytes], max_bytes: int) -> Documents:
    """Yield the image that a body is; one that was cut in what follows the image, too."""
    spool = Spool()
    wrong: list[Exception] = []
    try:
        for chunk in chunks:
            spool.write(chunk)
            if spool.size_bytes > max_bytes:
                wrong = [DecodingError(f"the body is longer than {max_bytes:,} bytes")]
                break
    except (BrokenOff, DecodingError) as error:
        wrong = [error]
    yield "", spool
    if wrong:
        raise wrong.pop()


def _documents(chunks: Iterable[bytes], max_bytes: int) -> Documents:
    """Yield the JSON documents of a body, the values of one that broke off, too, before saying what is wrong."""
    decoder = StreamingJSON(max_bytes=max_bytes)
    wrong: list[Exception] = []
    try:
        for chunk in chunks:
            decoder.feed(chunk)
    except (BrokenOff, DecodingError) as error:
        wrong = [error]
    documents, *early = decoder.finish()
    for document in documents:
        yield "", document
    wrong += [error for error in early if error]
    if wrong:
        raise wrong.pop(0)


class Kind(StrEnum):
    """What a document, or an event, is; the values are the ends of the names that events carry."""

    PARTIAL = "partial_image"
    COMPLETED = "completed"
    ERROR = "error"
    OTHER = "other"


def _kind(document: object, name: str, streamed: bool) -> Kind:
    """Tell by its type, else by the event's name; without either, only a finished image has counted tokens."""
    if not isinstance(document, Mapping):
        return Kind.COMPLETED if has_images(document) else Kind.OTHER
    ends = [str(label).rpartition(".")[2] for label in (document.get("type"), name)]
    if Kind.ERROR in ends:
        return Kind.ERROR
    if not has_images(document):
        return Kind.ERROR if find_error(document) else Kind.OTHER
    known = [Kind(end) for end in ends if end in (Kind.PARTIAL, Kind.COMPLETED)]
    untold = streamed and is_bare(document) and not document.get("usage")
    return known[0] if known else Kind.PARTIAL if untold else Kind.COMPLETED


def _reported(document: object) -> UnusableAnswer:
    facts = {**document, "status": "FAILED"} if isinstance(document, Mapping) and document else _NO_WORDS
    error = find_error(facts)
    return UnusableAnswer(error.message if error else "", error)


def _events(chunks: Iterator[bytes], max_bytes: int) -> Documents:
    """Yield the JSON of each event, up to the one that says that the stream is done."""
    data = _Data(max_bytes)
    for part in _parts(chunks):
        if not isinstance(part, EventEnd):
            data.feed(part)
            continue
        if data.is_done:
            return
        for document in data.documents() or [{}]:
            yield part.name, document
        data = _Data(max_bytes)


def _parts(chunks: Iterator[bytes]) -> Iterator[bytes | EventEnd]:
    """Yield the stream's parts; the end of the event in which the stream breaks off, too."""
    stream = EventStream()
    try:
        for chunk in chunks:
            yield from stream.feed(chunk)
    except (BrokenOff, DecodingError):
        yield from stream.finish()
        raise
    yield from stream.finish()


def _preview(document: object, count: int) -> PartialImage | None:
    """Return the preview, or None where it is no image: it must not cost the image that is being paid for."""
    try:
        image = read_answer(document).items[0].image
    except UnusableAnswer as error:
        log.debug("a preview is no image: %s", error)
        return None
    if image is None or not isinstance(document, Mapping):
        return None
    index = document.get("partial_image_index")
    return PartialImage(image[0], image[1].media_type, index if type(index) is int else count)


class _Data:
    """The data of one event; of what is no JSON, or longer than `max_bytes`, what came before counts."""

    def __init__(self, max_bytes: int) -> None:
        self._head = b""
        self._json = StreamingJSON(max_bytes=max_bytes)
        self._is_over = False

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the data.

        Raises:
            OSError: a spool file can't be written.
        """
        if len(self._head) < _LONGEST_DONE:
            self._head += piece[:_LONGEST_DONE]
        if self._is_over:
            return
        try:
            self._json.feed(piece)
        except DecodingError:
            self._is_over = True

    @property
    def is_done(self) -> bool:
        """Whether it says that the stream is done."""
        return self._head.strip() == _DONE

    def documents(self) -> list[object]:
        """Return its JSON."""
        return self._json.finish()[0]


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
