"""From an open event stream to previews and finished images, as they come."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from prefect_ttapi.images.headers import NotAnImage
from prefect_ttapi.responses import PartialImage, Usage
from prefect_ttapi.wire.events import EventReader, ImageEvent, Kind
from prefect_ttapi.wire.outcomes import UNUSABLE
from prefect_ttapi.wire.payload import UnusableAnswer, read_answer
from prefect_ttapi.wire.reading import Received, not_kept, read_reply, receive
from prefect_ttapi.wire.retries import Failure
from prefect_ttapi.wire.transport import Broken, Opened

log: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A finished image, and the tokens it took where the API says so."""

    received: Received
    usage: Usage | None


Part = PartialImage | Finished | Failure


def read_stream(opened: Opened, most: int, max_bytes: int) -> Iterator[Part]:
    """Previews and finished images. A Failure says that the rest is of no use; it need not be read.

    Args:
        most: finished images after which the rest of the stream does not matter.
        max_bytes: the longest event, and the longest answer of a server that does not stream.
    """
    try:
        # whatever its type is said to be: no event begins with a bracket
        at_once = opened.peek().lstrip().startswith(b"{") or opened.media_type.endswith("json")
    except Broken as broken:
        return iter([broken.failure])
    return _read_at_once(opened, max_bytes) if at_once else _read_events(opened, most, max_bytes)


def _read_events(opened: Opened, most: int, max_bytes: int) -> Iterator[Part]:
    finished = previews = 0
    failure = opened.failure(UNUSABLE, "the stream ended before its image was finished")
    for event in _events(opened, max_bytes):
        if isinstance(event, Failure):
            failure = event
        elif event.error is not None:
            yield opened.failure(UNUSABLE, event.error.message)
        elif event.kind is Kind.DONE:
            break
        elif event.kind is Kind.PARTIAL and (preview := _preview(event, previews)) is not None:
            yield preview
            previews += 1
        elif event.kind is Kind.COMPLETED:
            yield _finished(event, opened)
            finished += 1
            if finished == most:
                return
    if not finished:
        yield failure


def _events(opened: Opened, max_bytes: int) -> Iterator[ImageEvent | Failure]:
    """The stream's events, then why it broke off, where it did. What came whole before counts."""
    reader = EventReader(max_bytes)
    chunks = opened.chunks()
    chunk: bytes | None = b""
    failure = None
    while chunk is not None and failure is None:
        try:
            chunk = next(chunks, None)
            events = list(reader.finish() if chunk is None else reader.feed(chunk))
        except Broken as broken:
            failure, events = broken.failure, list(reader.finish())
        except OSError as error:
            failure, events = not_kept(opened, error), []
        yield from events
    if failure is not None:
        yield failure


def _finished(event: ImageEvent, opened: Opened) -> Finished | Failure:
    try:
        answer = read_answer({"data": [event.document], "usage": event.document.get("usage")})
        return Finished(receive(answer.items[0]), answer.usage)
    except (UnusableAnswer, NotAnImage) as error:
        return opened.failure(UNUSABLE, str(error))


def _preview(event: ImageEvent, count: int) -> PartialImage | None:
    """A preview that is no image is passed over: it must not cost the image that is being paid for."""
    try:
        received = receive(read_answer({"data": [event.document]}).items[0])
    except (UnusableAnswer, NotAnImage) as error:
        log.debug("a preview is no image: %s", error)
        return None
    if received.fetched is None:
        return None
    spool, facts = received.fetched
    index = event.document.get("partial_image_index")
    return PartialImage(spool, facts.media_type, index if type(index) is int else count)


def _read_at_once(opened: Opened, max_bytes: int) -> Iterator[Finished | Failure]:
    """The images of a server that answers all at once although it was asked to stream."""
    reply = read_reply(opened, max_bytes)
    if isinstance(reply, Failure):
        yield reply
    else:
        for index, received in enumerate(reply.images):
            yield Finished(received, None if index else reply.usage)
