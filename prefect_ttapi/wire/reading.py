"""From an open answer to checked images, as far as they came with it: what is behind a URL is still to
fetch."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import SecretStr

from prefect_ttapi.images.headers import ImageFacts, NotAnImage, read_image
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.responses import Usage
from prefect_ttapi.wire.json_stream import DecodingError, EarlyEnd, StreamingJSON
from prefect_ttapi.wire.outcomes import UNUSABLE
from prefect_ttapi.wire.payload import Item, UnusableAnswer, read_answer
from prefect_ttapi.wire.retries import Failure
from prefect_ttapi.wire.transport import Broken, Opened


@dataclass(frozen=True)
class Received:
    """One image: its bytes and what they are, or where to fetch them; the URL may be signed, hence secret."""

    fetched: tuple[Spool, ImageFacts] | None
    url: SecretStr
    revised_prompt: str | None


@dataclass(frozen=True)
class Reply:
    """A usable answer: at least one image; `problems` say why others that came are not among them."""

    images: tuple[Received, ...]
    problems: tuple[str, ...]
    usage: Usage | None
    created: int | None
    request_id: str | None


def receive(item: Item) -> Received:
    """`item`, checked.

    Raises:
        NotAnImage: its bytes are no complete PNG, JPEG or WebP.
    """
    fetched = (item.spool, read_image(item.spool)) if item.spool is not None else None
    return Received(fetched, SecretStr(item.url or ""), item.revised_prompt)


def read_reply(opened: Opened, max_bytes: int) -> Reply | Failure:
    """The answer, or why it is none. One bad image does not cost the others: they are paid."""
    decoder = StreamingJSON(max_bytes=max_bytes)
    try:
        for chunk in opened.chunks():
            decoder.feed(chunk)
        answer = read_answer(decoder.finish())
        received = [_received(item) for item in answer.items]
    except Broken as broken:
        return broken.failure
    except EarlyEnd as error:
        return opened.ends_early(str(error))
    except (DecodingError, UnusableAnswer) as error:
        return opened.failure(UNUSABLE, str(error))
    except OSError as error:
        return not_kept(opened, error)
    images = tuple(image for image in received if isinstance(image, Received))
    problems = (*answer.problems, *(str(image) for image in received if isinstance(image, NotAnImage)))
    if not images:
        return opened.failure(UNUSABLE, problems[0])
    return Reply(images, problems, answer.usage, answer.created, opened.request_id)


def _received(item: Item) -> Received | NotAnImage:
    try:
        return receive(item)
    except NotAnImage as error:
        return error


def not_kept(opened: Opened, error: OSError) -> Failure:
    """The failure of an answer that came, and is perhaps paid, but found no room."""
    return opened.failure(UNUSABLE, f"the answer could not be kept in a temporary file: {error.strerror}")
