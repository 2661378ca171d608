"""From a body to facts: which images came, what they cost, or what went wrong (sans-IO)."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pydantic import SecretStr

from prefect_ttapi.api.json_stream import BASE64_KEYS, DecodingError, StreamingJSON, plain_key
from prefect_ttapi.api.outcomes import ErrorBody
from prefect_ttapi.errors import printable
from prefect_ttapi.images.headers import ImageFacts, NotAnImage, read_image
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.results import Usage

LONGEST_MESSAGE: Final = 2_000  # characters
_LONGEST_LABEL: Final = 100
_LONGEST_ERROR: Final = 64 * 1024  # bytes of an error's body that are looked at

#: Where relays put what the API has in `data`, `b64_json` and `url`: keys in lower case, without dashes.
_WRAPPER_KEYS: Final = (
    *("data", "images", "image", "output", "outputs", "result", "results", "response", "artifacts"),
    *("predictions", "generatedimages", "imagelist", "items", "inlinedata", "content", "body", "payload"),
)
_BYTES_KEYS: Final = (*BASE64_KEYS, "image", "imagedata", "data")
_SURELY_URLS: Final = ("url", "imageurl")
_URL_KEYS: Final = (*_SURELY_URLS, "uri", "imageuri", "src", "link", "downloadurl", "signedurl", "fileurl")

#: What else may be a picture: under such a key none is taken for the image.
_OTHER_PICTURES: Final = re.compile(
    "preview|partial|thumb|input|mask|request|reference|original|source|logo|icon"
)

_URL: Final = re.compile(r"[\s\"'`<]*https?://", re.IGNORECASE)
_AROUND_URLS: Final = " \t\r\n\"'`<>"
_LINE_BREAKS: Final = re.compile(r"[\r\n\t]")

#: Where errors keep their words: OpenAI's and the vendor's, other relays', web frameworks'.
_MESSAGE_KEYS: Final = ("message", "msg", "detail", "error")
#: What `error` says where there is none.
_NO_ERROR: Final = frozenset({"", "0", "none", "null", "false", "no", "no error", "ok", "success"})
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
    """The images of an answer, at least one but at the end of a stream that broke off.

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
        reported: what the API says instead, if anything.
        is_failure: that is an error by its form, too, and no images are to come.
    """

    def __init__(self, message: str, reported: ErrorBody | None = None, *, is_failure: bool = False) -> None:
        super().__init__(message)
        self.reported = reported
        self.is_failure = is_failure


def read_answer(document: object) -> Answer:
    """Return the facts of a 200's document, as `StreamingJSON` gives it, however its images are wrapped and named.

    One bad image does not cost the others: they are paid. Nor does an error that comes with images.

    Raises:
        UnusableAnswer: it reports an error, or has no images.

    >>> read_answer({"created": 1745818538, "data": [{"url": "https://host/cat.webp"}]}).items
    (Item(image=None, url=SecretStr('**********'), revised_prompt=None),)
    """
    wrappers: list[Mapping[str, Any]] = []
    found = list(_found(document, None, wrappers))
    items = tuple(item for item in found if isinstance(item, Item))
    error = next((error for wrapper in wrappers if (error := find_error(wrapper))), None)
    # a URL that stands right beside an error may be that of a manual
    bare = isinstance(document, Mapping) and is_bare(document)
    paid = any(item.image or (not bare and _URL.match(item.url.get_secret_value())) for item in items)
    if error is not None and not paid:
        raise UnusableAnswer(error.message, error, is_failure=not found)
    if not items:
        raise _without_images(document, found)
    wrong = [_told(index, item) for index, item in enumerate(found) if not isinstance(item, Item)]
    facts = {key: value for wrapper in wrappers for key, value in wrapper.items()}
    created = facts.get("created")
    return Answer(
        items=items,
        usage=read_usage(facts.get("usage")),
        created=created if type(created) is int else None,
        problems=(*wrong, *([error.message] if error else [])),
    )


def _without_images(document: object, found: Sequence[Item | ErrorBody | str]) -> UnusableAnswer:
    if found and not isinstance(found[0], Item):
        reported = found[0] if isinstance(found[0], ErrorBody) else None
        return UnusableAnswer(_told(0, found[0]), reported, is_failure=reported is not None)
    if not isinstance(document, Mapping):
        return UnusableAnswer("the answer is no JSON object")
    said = _error_body(document)
    # where there is more than words, it may be images that nobody knows how to read: the words are not about an error
    more = [value for key, value in document.items() if value and key not in _MESSAGE_KEYS]
    is_all = not any(
        isinstance(value, Mapping | list | Spool) or len(str(value)) > _LONGEST_LABEL for value in more
    )
    speaks = any(isinstance(document.get(key), str) for key in _MESSAGE_KEYS)
    return UnusableAnswer(f"the answer has no images: {said.message}", said if is_all and speaks else None)


def _told(index: int, wrong: ErrorBody | str) -> str:
    return f"item {index} of the answer: {wrong if isinstance(wrong, str) else wrong.message}"


def has_images(document: object) -> bool:
    """Tell whether there is anything in a document that could be an image."""
    return any(True for _ in _found(document, None, []))


def is_bare(document: Mapping[str, Any]) -> bool:
    """Tell whether an image stands in the document itself, with nothing around it."""
    return any(_is_image(value) or plain_key(key) in _URL_KEYS for key, value in document.items() if value)


def _found(
    value: object, prompt: object, wrappers: list[Mapping[str, Any]]
) -> Iterator[Item | ErrorBody | str]:
    """Yield the images below `value`, and what is wrong with those that are none.

    Args:
        prompt: the revised prompt of what is around it.
        wrappers: gets the objects around the images, from the outside in.
    """
    match value:
        case Spool() | DecodingError():
            yield _read(value, "", prompt)
        case str() if _URL.match(value):
            yield _read(None, value, prompt)
        case str() if value.lstrip().startswith(("{", "[")):  # JSON in JSON
            decoder = StreamingJSON()
            with suppress(DecodingError):
                decoder.feed(value.encode(errors="replace"))
            for document in decoder.finish()[0]:
                yield from _found(document, prompt, wrappers)
        case list():
            for item in value:
                yield from list(_found(item, prompt, [])) or [_no_image(item)]
        case Mapping():
            yield from _found_in_object(value, value.get("revised_prompt") or prompt, wrappers)


def _found_in_object(
    value: Mapping[str, Any], prompt: object, wrappers: list[Mapping[str, Any]]
) -> Iterator[Item | ErrorBody | str]:
    named = {plain_key(key): inner for key, inner in value.items()}
    image = next((named[key] for key in (*_BYTES_KEYS, *_URL_KEYS) if _is_image(named.get(key))), None)
    wrappers.append(value)
    if not isinstance(image, Spool):
        wrapped = list(_wrapped(named, prompt, wrappers))
        found = next((found for found in wrapped if any(isinstance(item, Item) for item in found)), None)
        if found or (wrapped and image is None and not _url_in(named)):
            yield from found or wrapped[0]
            return
    others = (inner for key, inner in named.items() if _is_image(inner) and not _OTHER_PICTURES.search(key))
    image = image or next(others, None)
    if image is not None or _url_in(named):
        yield _read(image, _url_in(named), prompt)


def _wrapped(
    named: Mapping[str, Any], prompt: object, wrappers: list[Mapping[str, Any]]
) -> Iterator[list[Item | ErrorBody | str]]:
    for key in (*_WRAPPER_KEYS, *_URL_KEYS):
        inner = named.get(key)
        if inner and (key in _WRAPPER_KEYS or not isinstance(inner, str)):
            found = list(_found(inner, prompt, wrappers))
            if found:
                yield found
    for key, inner in named.items():  # under a name that is not known, bytes alone are surely an image
        if isinstance(inner, Mapping | list) and not _OTHER_PICTURES.search(key):
            found = [item for item in _found(inner, prompt, []) if isinstance(item, Item) and item.image]
            if found:
                yield list[Item | ErrorBody | str](found)


def _url_in(named: Mapping[str, Any]) -> str:
    """Return what should be a URL by its key, or is one by its looks; empty where there is none."""
    texts = ((key, named[key]) for key in (*_URL_KEYS, *_BYTES_KEYS) if isinstance(named.get(key), str))
    return next(
        (text for key, text in texts if _URL.match(text) or (key in _SURELY_URLS and text.strip())), ""
    )


def _is_image(value: object) -> bool:
    return isinstance(value, Spool | DecodingError)


def _no_image(item: object) -> ErrorBody | str:
    if not isinstance(item, Mapping):
        return "it is no JSON object"
    return find_error(item) or "it has neither b64_json nor url"


def _read(image: Spool | DecodingError | None, url: str, prompt: object) -> Item | str:
    """Return an image, or why it is none; where its bytes are none, there may be a URL."""
    address = SecretStr(_LINE_BREAKS.sub("", url.strip(_AROUND_URLS)))
    wrong = str(image)
    if isinstance(image, Spool):
        try:
            return Item((image, read_image(image)), address, _storable(prompt))
        except NotAnImage as error:
            wrong = str(error)
    return Item(None, address, _storable(prompt)) if url else wrong


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
    error = document.get("error")
    is_none = not error or str(error).strip().lower() in _NO_ERROR
    return _error_body(document) if failed or not is_none else None


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
    line = printable(text)
    if len(line) <= LONGEST_MESSAGE:
        return line
    # cut between words: half a word could be half a key, which nobody would recognise later and take out
    return (line[:LONGEST_MESSAGE].rpartition(" ")[0] + " ...").strip()
