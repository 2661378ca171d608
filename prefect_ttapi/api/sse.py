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
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Final

from prefect_ttapi.api.json_stream import DecodingError, Reading, StreamingJSON
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


@dataclass(frozen=True)
class Body:
    """The body of a 2xx: its bytes as they arrive, what the answer says they are, and how far they are read."""

    chunks: Iterable[bytes]
    media_type: str = ""
    reading: Reading = field(default_factory=Reading)


def read_answers(
    body: Body, most: int, max_bytes: int, *, streamed: bool = True
) -> Iterator[PartialImage | Answer]:
    """Yield previews, and finished images as they come, in one or more answers.

    What is wrong with the body does no harm once there is an image: it is a problem of a last answer without images.

    Args:
        most: finished images after which the rest of a stream does not matter.
        max_bytes: the longest event, or body that is no stream.
        streamed: a stream was asked for, so that an image without a word beside it is a preview.

    Raises:
        BrokenOff, DecodingError, UnusableAnswer, OSError: no image was finished.
    """
    is_stream, documents = _recognised(body, max_bytes)
    finished = previews = 0
    # no variable: an error that is raised would keep this frame, and the images, alive
    wrong: list[Exception] = []
    without: list[Exception] = []  # documents that have nothing like an image
    try:
        for name, document in documents:
            ends = _ends(document, name)
            try:
                answer = read_answer(document)
            except UnusableAnswer as error:
                if Kind.ERROR in ends or find_error(document):
                    raise _reported(document) from None
                if Kind.PARTIAL not in ends:  # a preview must not cost the image that is being paid for
                    (wrong if has_images(document) else without).append(error)
                continue
            if Kind.PARTIAL in ends or (streamed and is_stream and _is_untold(document, ends)):
                for preview in _previews(answer, document, previews):
                    yield preview
                    previews += 1
                continue
            yield answer
            finished += len(answer.items)
            if is_stream and finished >= most:
                break
    except (BrokenOff, DecodingError, UnusableAnswer, OSError) as error:
        wrong = [error]
    if finished and wrong:
        yield Answer((), problems=(str(wrong[0]),))
    if not finished:
        wrong += [] if is_stream else without
        raise wrong.pop(0) if wrong else UnusableAnswer("the stream ended before its image was finished")


def read_answer_of(body: Body, most: int, max_bytes: int) -> Answer:
    """Return all images of a body that was not asked to be a stream.

    Raises:
        BrokenOff, DecodingError, UnusableAnswer, OSError: it has none.
    """
    parts = [part for part in read_answers(body, most, max_bytes, streamed=False) if isinstance(part, Answer)]
    return Answer(
        items=tuple(item for part in parts for item in part.items),
        usage=next((part.usage for part in reversed(parts) if part.usage), None),
        created=next((part.created for part in parts if part.created is not None), None),
        problems=tuple(problem for part in parts for problem in part.problems),
    )


def _recognised(body: Body, max_bytes: int) -> tuple[bool, Documents]:
    """Return whether a body is a stream of events, and its documents."""
    head, chunks = _peeked(iter(body.chunks))
    if media_type_of(head) is not None:
        return False, _image(chunks, max_bytes)
    told = head.removeprefix(_BOM).lstrip()
    if _TEXT.match(told):  # an image or its URL, and no JSON around it
        return False, _documents(chain([b'"'], chunks, [b'"']), StreamingJSON(max_bytes))
    if _FIELD.match(told) or (
        body.media_type == "text/event-stream" and not told.startswith((b"{", b"[", b'"'))
    ):
        return True, _events(chunks, max_bytes, body.reading)
    return False, _documents(chunks, StreamingJSON(max_bytes, body.reading))


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


def _documents(chunks: Iterable[bytes], decoder: StreamingJSON) -> Documents:
    """Yield the JSON documents of a body, the values of one that broke off, too, before saying what is wrong."""
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
    """What an event is; the values are the ends of the names that events carry."""

    PARTIAL = "partial_image"
    COMPLETED = "completed"
    ERROR = "error"


def _ends(document: object, name: str) -> list[str]:
    """Return how the type of a document ends, and the name of its event."""
    kind = document.get("type") if isinstance(document, Mapping) else ""
    return [str(label).rpartition(".")[2] for label in (kind, name)]


def _is_untold(document: object, ends: list[str]) -> bool:
    """Tell whether an image says nothing of what it is: it is a preview, as only a finished one has counted tokens."""
    if Kind.COMPLETED in ends or not isinstance(document, Mapping):
        return False
    return is_bare(document) and not document.get("usage")


def _reported(document: object) -> UnusableAnswer:
    facts = {**document, "status": "FAILED"} if isinstance(document, Mapping) and document else _NO_WORDS
    error = find_error(facts)
    return UnusableAnswer(error.message if error else "", error, is_failure=not has_images(document))


def _events(chunks: Iterator[bytes], max_bytes: int, reading: Reading) -> Documents:
    """Yield the JSON of each event, up to the one that says that the stream is done."""
    data = _Data(StreamingJSON(max_bytes, reading))
    for part in _parts(chunks):
        if not isinstance(part, EventEnd):
            data.feed(part)
            continue
        if data.is_done:
            return
        for document in data.documents() or [{}]:
            yield part.name, document
        data = _Data(StreamingJSON(max_bytes, reading))


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


def _previews(answer: Answer, document: object, count: int) -> Iterator[PartialImage]:
    index = document.get("partial_image_index") if isinstance(document, Mapping) else None
    for number, item in enumerate(answer.items, count):
        if item.image is not None:
            spool, facts = item.image
            yield PartialImage(spool, facts.media_type, index if type(index) is int else number)


class _Data:
    """The data of one event; of what is no JSON, or too long, what came before counts."""

    def __init__(self, decoder: StreamingJSON) -> None:
        self._head = b""
        self._json = decoder
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
