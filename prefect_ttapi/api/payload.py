"""From a body to facts: which images came, what they cost, or what went wrong (sans-IO)."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import SecretStr

from prefect_ttapi.api.json_stream import StreamingJSON
from prefect_ttapi.api.outcomes import ErrorBody
from prefect_ttapi.images.headers import ImageFacts, NotAnImage, read_image
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.results import Usage

LONGEST_MESSAGE: Final = 2_000  # characters
_LONGEST_LABEL: Final = 100
_LONGEST_ERROR: Final = 64 * 1024  # bytes of an error's body that are looked at

#: Where errors keep their words: OpenAI's and the vendor's, other relays', web frameworks'.
_MESSAGE_KEYS: Final = ("message", "msg", "detail", "error")
#: Where the facts of an error are, if not beside each other in the document.
_ERROR_KEYS: Final = ("error", "errors", "detail")
#: What Cloudflare's firewall says to programs.
_CLOUDFLARE: Final = re.compile(r"error code: 1[0-9]{3}")

# each alternative takes its end or all there is, so that no text is gone through twice
_HIDDEN: Final = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1[^<>]*>?|\Z)", re.DOTALL | re.IGNORECASE
)
_TAG: Final = re.compile(r"<[^<>]*>")


@dataclass(frozen=True)
class Item:
    """One image of an answer: its bytes and what they are, or where to fetch them, or both.

    Attributes:
        url: empty where there is none; perhaps signed, hence secret.
    """

    image: tuple[Spool, ImageFacts] | None
    url: SecretStr
    revised_prompt: str | None = None


@dataclass(frozen=True)
class Answer:
    """The images of an answer, at least one.

    Attributes:
        usage: the tokens that they took.
        created: the API's time stamp in Unix seconds.
        problems: why others that came are not among them.
    """

    items: tuple[Item, ...]
    usage: Usage | None = None
    created: int | None = None
    problems: tuple[str, ...] = ()


class UnusableAnswer(ValueError):  # noqa: N818 - named for what it is about
    """A 200 without usable images; its message is the API's own where there is one.

    Attributes:
        reported: the error that it reports instead, if any.
    """

    def __init__(self, message: str, reported: ErrorBody | None = None) -> None:
        super().__init__(message)
        self.reported = reported


def read_body(chunks: Iterable[bytes], max_bytes: int) -> Answer:
    """Return the facts of a 200's body.

    Raises:
        DecodingError: it is not JSON, ends early, or is longer than `max_bytes`.
        UnusableAnswer: it reports an error, or has no images.
        OSError: its images can't be kept.
    """
    decoder = StreamingJSON(max_bytes=max_bytes)
    for chunk in chunks:
        decoder.feed(chunk)
    return read_answer(decoder.finish())


def read_answer(document: object) -> Answer:
    """Return the facts of a 200's document, as `StreamingJSON` gives it, with or without the vendor's older wrapper.

    One bad image does not cost the others: they are paid.

    Raises:
        UnusableAnswer: it reports an error, or has no images.

    >>> read_answer({"created": 1745818538, "data": [{"url": "https://host/cat.webp"}]}).items
    (Item(image=None, url=SecretStr('**********'), revised_prompt=None),)
    """
    if not isinstance(document, Mapping):
        raise UnusableAnswer("the answer is no JSON object")
    inner = document.get("data")
    error = find_error(document) or find_error(inner)
    if error is not None:
        raise UnusableAnswer(error.message, error)
    facts = {**document, **inner} if isinstance(inner, Mapping) else document
    items = facts.get("data")
    if not isinstance(items, list) or not items:
        raise UnusableAnswer(f"the answer has no images: {_error_body(document).message}")
    read = [_item(index, item) for index, item in enumerate(items)]
    problems = tuple(item for item in read if isinstance(item, str))
    if len(problems) == len(read):
        raise UnusableAnswer(problems[0])
    created = facts.get("created")
    return Answer(
        items=tuple(item for item in read if isinstance(item, Item)),
        usage=read_usage(facts.get("usage")),
        created=created if type(created) is int else None,
        problems=problems,
    )


def _item(index: int, item: object) -> Item | str:
    """Return the image, or why it is none."""
    if not isinstance(item, Mapping):
        return f"item {index} of the answer is no JSON object"
    spool, url = item.get("b64_json"), item.get("url")
    # a relay may send both, and one of them empty
    kept = spool if isinstance(spool, Spool) and spool.size_bytes else None
    address = url if isinstance(url, str) else ""
    if kept is None and not address:
        return f"item {index} of the answer has neither b64_json nor url"
    try:
        image = (kept, read_image(kept)) if kept is not None else None
    except NotAnImage as error:
        return str(error)
    return Item(image, SecretStr(address), _storable(item.get("revised_prompt")))


def _storable(text: object) -> str | None:
    # JSON may hold half a surrogate pair, which no file takes, and NUL, which some databases don't
    return text.encode(errors="replace").decode().replace("\0", "?") if isinstance(text, str) else None


def read_usage(usage: object) -> Usage | None:
    """Return the tokens, or None where they can't be read, or written down again: they must not cost the images."""
    try:
        read = Usage.model_validate(usage)
        read.model_dump_json()
    except ValueError:
        return None
    return read


def find_error(document: object) -> ErrorBody | None:
    """Return the error that a 200's document, or an event of a stream, reports instead of an image, if any.

    >>> find_error({"status": "FAILED", "message": "queue timeout", "data": None})
    ErrorBody(message='queue timeout', type=None, code=None, inner=None, page=False)
    """
    if not isinstance(document, Mapping):
        return None
    failed = str(document.get("status")).upper() == "FAILED"
    return _error_body(document) if failed or document.get("error") else None


def read_error(body: bytes, content_type: str | None) -> ErrorBody:
    """Return what an error's body says, whatever its shape: the vendor's, OpenAI's, a proxy's HTML. Never raises.

    >>> read_error(b'{"error": {"message": "no such size", "code": "invalid_value"}}', "application/json")
    ErrorBody(message='no such size', type=None, code='invalid_value', inner=None, page=False)
    >>> read_error(b"<html><title>504</title><h1>Gateway Time-out</h1></html>", "text/html").message
    '504 Gateway Time-out'
    """
    text = body[:_LONGEST_ERROR].decode("utf-8-sig", errors="replace")
    try:
        document = json.loads(text)
        if isinstance(document, dict):
            return _error_body(document)
    except (ValueError, RecursionError):
        pass
    page = "html" in (content_type or "").lower() or text.lstrip().startswith("<")
    if page:
        text = html.unescape(_TAG.sub(" ", _HIDDEN.sub(" ", text)))
    line = _one_line(text) or "no message"
    return ErrorBody(line, page=page or _CLOUDFLARE.fullmatch(line) is not None)


def _error_body(document: Mapping[str, Any]) -> ErrorBody:
    facts = next((error for error in map(_first, map(document.get, _ERROR_KEYS)) if error), document)
    inner = facts.get("innererror")
    said = (facts.get(key) for key in _MESSAGE_KEYS)
    message = next((text for text in said if isinstance(text, str) and text.strip()), None)
    return ErrorBody(
        _one_line(message or json.dumps(facts, default=str)),
        type=_label(facts.get("type")),
        code=_label(facts.get("code")),
        inner=_label(inner.get("code")) if isinstance(inner, Mapping) else None,
    )


def _first(error: object) -> Mapping[str, Any] | None:
    """Return an error's object, or the first of several, if it has any."""
    first = error[0] if isinstance(error, list) and error else error
    return first if isinstance(first, Mapping) else None


def _label(value: object) -> str | None:
    return _one_line(str(value))[:_LONGEST_LABEL] if isinstance(value, str | int) else None


def _one_line(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(printable.split())
    if len(line) <= LONGEST_MESSAGE:
        return line
    # cut between words: half a word could be half a key, which nobody would recognise later and take out
    return (line[:LONGEST_MESSAGE].rpartition(" ")[0] + " ...").strip()
