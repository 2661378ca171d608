"""Metadata beside an object: S3 takes ASCII only, and not much of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, unquote

#: S3's limit on the names and values of one object, in bytes.
MOST: Final = 2048

#: Printable ASCII without the percent sign, which is what marks an encoded byte.
_PLAIN: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%") + " "


def ascii_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` as S3 takes it: lower-case names with dashes, values percent-encoded where they must be.

    The longest values are cut where all of it is more than 2,048 bytes: what was paid for is not lost over a
    label.

    >>> ascii_metadata({"request_hash": "ab", "prompt": "Zoë, 100 %"})
    {'request-hash': 'ab', 'prompt': 'Zo%C3%AB, 100 %25'}
    """
    encoded = {re.sub(r"[^a-z0-9-]", "-", name.lower()): _encoded(value) for name, value in metadata.items()}
    names = sum(map(len, encoded))
    longest = max(map(len, encoded.values()), default=0)
    while names + sum(len(value[:longest]) for value in encoded.values()) > MOST and longest:
        longest -= 16
    return {name: _cut(value, longest) for name, value in encoded.items()}


def read_metadata(value: str) -> str:
    """The text that `ascii_metadata` encoded.

    >>> read_metadata("Zo%C3%AB, 100 %25")
    'Zoë, 100 %'
    """
    return unquote(value, errors="replace")


def _encoded(value: str) -> str:
    encoded = quote(value, safe=_PLAIN, errors="replace")
    # S3 trims spaces at either end
    body = encoded.strip(" ")
    before = len(encoded) - len(encoded.lstrip(" "))
    after = len(encoded) - before - len(body)
    return "%20" * before + body + "%20" * after if body else "%20" * len(encoded)


def _cut(value: str, length: int) -> str:
    """At most `length` characters of an encoded value, and no character cut in two."""
    if len(value) <= length:
        return value
    whole_escapes = re.sub(r"%[0-9A-F]?$", "", value[: max(length, 0)])
    return _encoded(unquote(whole_escapes, errors="ignore").rstrip(" "))
