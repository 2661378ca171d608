"""Images from a 2xx's body, whatever it is: JSON, JSON Lines, server-sent events, an image (sans-IO).

The first bytes of a body tell its kind, whatever its type says and whatever was asked for. Events are framed by the
WHATWG's rules. An event's data is handed on as it arrives, so that an event of 64 MiB costs no memory here. Lines end
with LF, CR or CRLF; one byte-order mark is skipped; comments, `id`, `retry` and unknown fields mean nothing to us. An
event's JSON may lack fields; unknown ones are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Final

from prefect_ttapi.api.json_stream import DecodingError, Reading, StreamingJSON
from prefect_ttapi.api.outcomes import BrokenOff
from prefect_ttapi.api.payload import Answer, UnusableAnswer, find_error, has_images, is_bare, read_answer
from prefect_ttapi.images.headers import media_type_of
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.results import PartialImage

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
    """The body of a 2xx: its bytes as they arrive, what the answer says they are, and how far they are read.

    Attributes:
        broke: why it can't be read to its end, the first reason first; empty where it can.
    """

    chunks: Iterable[bytes]
    media_type: str = ""
    reading: Reading = field(default_factory=Reading)
    broke: list[Exception] = field(default_factory=list)

    def pieces(self) -> Iterator[bytes]:
        """Yield its bytes as far as they come; `broke` says why no more did."""
        try:
            for chunk in self.chunks:  # noqa: UP028 - "yield from" would close them, and who keeps the body reads on
                yield chunk
        except (BrokenOff, DecodingError) as error:
            self.broke.append(error)


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
    wrong: list[Exception] = []
    without: list[Exception] = []  # documents that have nothing like an image
    try:
        for name, document in documents:
            ends = _ends(document, name)
            try:
                answer = read_answer(document)
            except UnusableAnswer as error:
                if Kind.ERROR in ends or find_error(document):
                    body.broke.insert(0, _reported(document))
                    break
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
    except OSError as error:
        body.broke.insert(0, error)
    wrong = body.broke or wrong
    if finished and wrong:
        yield Answer((), problems=(str(wrong[0]),))
    if not finished:
        wrong += [] if is_stream else without
        # taken out of the list: an error that is raised keeps this frame alive, which must not keep the error
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
    pieces, head = body.pieces(), b""
    for piece in pieces:
        head += piece
        if len(head.lstrip()) >= _BEGINNING or len(head) > _MOST_BLANKS:
            break
    whole = chain([head], pieces)
    if media_type_of(head) is not None:
        return False, _image(body, whole, max_bytes)
    told = head.removeprefix(_BOM).lstrip()
    if _TEXT.match(told):  # an image or its URL, and no JSON around it
        return False, _documents(body, _quoted(body, whole), StreamingJSON(max_bytes))
    if _FIELD.match(told) or (
        body.media_type == "text/event-stream" and not told.startswith((b"{", b"[", b'"'))
    ):
        return True, _events(whole, max_bytes, body.reading)
    return False, _documents(body, whole, StreamingJSON(max_bytes, body.reading))


def _quoted(body: Body, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a text as a JSON string, without its end where the body broke off: half a URL is none."""
    yield b'"'
    yield from pieces
    if not body.broke:
        yield b'"'


def _image(body: Body, pieces: Iterable[bytes], max_bytes: int) -> Documents:
    """Yield the image that a body is; one that was cut in what follows the image, too."""
    spool = Spool()
    for piece in pieces:
        spool.write(piece)
        if spool.size_bytes > max_bytes:
            body.broke.append(DecodingError(f"the body is longer than {max_bytes:,} bytes"))
            break
    yield "", spool


def _documents(body: Body, pieces: Iterable[bytes], decoder: StreamingJSON) -> Documents:
    """Yield the JSON documents of a body, and the values of one that broke off."""
    try:
        for piece in pieces:
            decoder.feed(piece)
    except DecodingError as error:
        body.broke.append(error)
    documents, *early = decoder.finish()
    body.broke.extend(filter(None, early))
    for document in documents:
        yield "", document


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


def _events(pieces: Iterable[bytes], max_bytes: int, reading: Reading) -> Documents:
    """Yield the JSON of each event, up to the one that says that the stream is done.

    Of data that is no JSON, or too long, what came before counts.
    """
    decoder, head, reads = StreamingJSON(max_bytes, reading), b"", True
    for part in framed(pieces):
        if isinstance(part, bytes):
            head += part[: _LONGEST_DONE - len(head)]
            try:
                if reads:
                    decoder.feed(part)
            except DecodingError:
                reads = False
            continue
        if head.strip() == _DONE:
            return
        for document in decoder.finish()[0] or [{}]:
            yield part.name, document
        decoder, head, reads = StreamingJSON(max_bytes, reading), b"", True


def _previews(answer: Answer, document: object, count: int) -> Iterator[PartialImage]:
    index = document.get("partial_image_index") if isinstance(document, Mapping) else None
    for number, item in enumerate(answer.items, count):
        if item.image is not None:
            spool, facts = item.image
            yield PartialImage(spool, facts.media_type, index if type(index) is int else number)


@dataclass(frozen=True)
class EventEnd:
    """The end of an event, whose data are the pieces since the last one.

    Attributes:
        name: its `event` field, empty where it had none.
    """

    name: str


def framed(pieces: Iterable[bytes]) -> Iterator[bytes | EventEnd]:
    r"""Yield the events of a stream: of each the pieces of its data, then its `EventEnd`.

    The rules drop a last event without the empty line that ends it. Here it is up to its data whether it is whole: it
    may be a paid image.

    >>> list(framed([b"event: hi\ndata: on", b"e\r\ndata:two\r\n\r\n"]))
    [b'on', b'e', b'\n', b'two', EventEnd(name='hi')]
    """
    line, name = b"", ""
    is_first, in_data, has_data = True, False, False
    for piece, ends in _lines(pieces):
        if in_data:
            yield piece
        else:
            line += piece
            if is_first and len(line) >= len(_BOM):
                line, is_first = line.removeprefix(_BOM), False
            # without its end it takes one character more to know the space that may come first
            known = ends or len(line) > len(_DATA)
            if known and (line.startswith(_DATA) or line == b"data"):
                if has_data:
                    yield b"\n"
                in_data = has_data = True
                yield line[len(_DATA) :].removeprefix(b" ")
            line = line[:_LONGEST_FIELD]
        if ends:
            field, _, value = line.partition(b":")
            if field == b"event":
                name = value.removeprefix(b" ").decode(errors="replace")
            elif not line:
                if has_data:
                    yield EventEnd(name)
                name, has_data = "", False
            line, is_first, in_data = b"", False, False
    if has_data:
        yield EventEnd(name)


def _lines(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield the pieces of each line without LF, CR or CRLF, and whether the line ends with the piece."""
    after_cr = False
    for piece in filter(None, pieces):
        text = piece.removeprefix(b"\n") if after_cr else piece
        after_cr = piece.endswith(b"\r")
        *ended, rest = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in ended:
            yield line, True
        yield rest, False
