"""Keeping the key, and the signed queries of image URLs, out of logs and messages.

httpx and httpcore log URLs and the headers of answers, in which a server may repeat anything: while a call of
ours is under way, their records lose what could hold a secret. Records of other users of httpx stay as they
are.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final
from urllib.parse import quote

from pydantic import SecretStr

from prefect_ttapi.capabilities import unmasked

LONGEST_MESSAGE: Final = 500
_LOOKED_AT: Final = 10_000  # characters

_URL_QUERY: Final = re.compile(r"(https?://[^\s\"'<>?#]*)[?#][^\s\"'<>]*", re.IGNORECASE)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")

#: Letters by which the beginning of a prompt is known for a quote of it.
_SURELY: Final = 20

_ours: ContextVar[bool] = ContextVar("prefect_ttapi_call_under_way", default=False)
_withheld: ContextVar[str] = ContextVar("prefect_ttapi_prompt_withheld", default="")


@contextmanager
def withholding(prompt: str) -> Iterator[None]:
    """Take quotes of `prompt` out of what a server says, in this thread, while it lasts."""
    token = _withheld.set(prompt)
    try:
        yield
    finally:
        _withheld.reset(token)


def without(prompt: str, text: str) -> str:
    """Return `text` with `[prompt]` where it quotes the prompt, or 20 letters and more of its beginning.

    Spaces don't matter.

    >>> without("a red car", "'a  red car' is refused")
    "'[prompt]' is refused"
    >>> without("a red car in front of the sea", "'a red car in front of the s...' is refused")
    "'[prompt]...' is refused"
    """
    letters = "".join(prompt.split())
    told, at = "", 0
    while letters and at < len(text):
        begins = not at or not text[at - 1].isalnum()
        end = _end_of_quote(letters, text, at) if begins else None
        told += "[prompt]" if end else text[at]
        at = end or at + 1
    return told or text


def _end_of_quote(letters: str, text: str, at: int) -> int | None:
    end, matched = at, 0
    while matched < len(letters) and end < len(text):
        if text[end] == letters[matched]:
            matched += 1
        elif not matched or not text[end].isspace():
            break
        end += 1
    whole = matched == len(letters) and not text[end : end + 1].isalnum()
    return end if whole or matched >= _SURELY else None


@contextmanager
def quiet() -> Iterator[None]:
    """Cut what httpx and httpcore log down to what can't hold a secret, in this thread, while it lasts."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def _keep_event_name(record: logging.LogRecord) -> bool:
    """Cut 'receive_response_headers.complete return_value=...' down to the event's name."""
    if _ours.get():
        record.msg, record.args = record.getMessage().partition(" ")[0], ()
    return True


def _drop(_: logging.LogRecord) -> bool:
    """Drop the record: each attempt is logged by us, without what a server could have put into its answer."""
    return not _ours.get()


logging.getLogger("httpx").addFilter(_drop)
for _name in ("connection", "http11", "http2", "proxy", "socks"):
    logging.getLogger(f"httpcore.{_name}").addFilter(_keep_event_name)


def checked_key(api_key: str | SecretStr) -> SecretStr:
    """Return the key, fit for a header.

    Raises:
        ValueError: it is empty, nothing but asterisks, or can't be in a header; the message does not show it.
    """
    secret = api_key if isinstance(api_key, SecretStr) else SecretStr(api_key)
    unmasked(secret)
    key = secret.get_secret_value()
    # what is illegal in a header would be shown by the error that httpx raises for it
    if not re.fullmatch(r"[\x21-\x7e]+", key.strip()):
        raise ValueError("api_key must be one word of ASCII characters; it is empty, or has others")
    return SecretStr(key.strip())


class Redactor:
    r"""Makes a server's words fit to be shown: one short line, without the key, without queries of URLs.

    >>> Redactor(SecretStr("s3cret")).clean("no such key: s3cret,\nsee https://host/x.png?sig=abc")
    'no such key: [key], see https://host/x.png?...'
    """

    def __init__(self, key: SecretStr) -> None:
        self._key = key

    def clean(self, text: str) -> str:
        """Return `text` in one line of at most `LONGEST_MESSAGE` characters, without secrets."""
        key = self._key.get_secret_value()
        if len(text) > _LOOKED_AT:  # cut between words: half a key would not be recognised
            text = text[:_LOOKED_AT].rpartition(" ")[0]
        text = without(_withheld.get(), text)
        for written in {key, quote(key, safe=""), json.dumps(key)[1:-1]}:
            text = re.sub(re.escape(written), "[key]", text, flags=re.IGNORECASE)
        line = _CONTROL.sub(" ", _URL_QUERY.sub(r"\1?...", text)).strip()
        return line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 3] + "..."
