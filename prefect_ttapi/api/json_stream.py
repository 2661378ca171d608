"""Streaming JSON: base64 images go to spool files while the body arrives, the rest to `json.loads`.

The scanner follows strings and brackets, no more: enough to know at which path a string stands. What stands
at an image's path is decoded on the way; the rest is kept and, at the end, judged by `json.loads`. In what is
kept an image is the word NaN: no string can be mistaken for it, and a NaN that was sent is refused.

Differs from `json.loads`: UTF-8 only (one byte-order mark is skipped); NaN and Infinity are refused; length
and nesting are bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final

import pybase64

from prefect_ttapi.images.spool import Spool

#: Where a value stands: the keys from the top, None for an array's item.
Path = tuple[str | None, ...]

#: Where images are: in an answer, in an answer inside the vendor's older wrapper, in an event of a stream.
IMAGE_PATHS: Final[frozenset[Path]] = frozenset(
    {("data", None, "b64_json"), ("data", "data", None, "b64_json"), ("b64_json",)}
)

MAX_BYTES: Final = 512 * 1024**2
MAX_KEPT: Final = 8 * 1024**2  # bytes of everything but images
MAX_IMAGES: Final = 100  # each takes up to 64 KiB of memory, or a file handle
MAX_TOKENS: Final = 100_000  # brackets, commas and strings: a list costs 64 bytes of memory for 3 of JSON
MAX_DEPTH: Final = 64

SLICE: Final = 256 * 1024  # base64 characters decoded at once

_TOKEN: Final = re.compile(rb'["{}\[\],N]')
_TEXT_STOP: Final = re.compile(rb'\\.|["\\]', re.DOTALL)
_BASE64_ESCAPE: Final = re.compile(rb"\\(?:(/)|u([0-9A-Fa-f]{4}))")
_LONGEST_ESCAPE: Final = len(rb"\u0041")


class DecodingError(ValueError):
    """The body is not in the encoding it claims, not JSON, too large, or holds an image that is not base64."""


class EarlyEnd(DecodingError):  # noqa: N818 - named for what happened
    """The body is the beginning of an answer: perhaps it was cut short on its way."""


class StreamingJSON:
    """Decodes a JSON body that is fed in pieces of any size; string values at `IMAGE_PATHS` become a `Spool`.

    Args:
        max_bytes: the longest body accepted.

    >>> decoder = StreamingJSON()
    >>> decoder.feed(b'{"created": 1, "data": [{"b64_json": "aW1h')
    >>> decoder.feed(b'Z2U="}]}')
    >>> document = decoder.finish()
    >>> document["created"], document["data"][0]["b64_json"].read_bytes()
    (1, b'image')
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._received = 0
        self._rest = b""  # of the last chunk: the start of an escape whose end is still to come
        self._kept = bytearray()
        self._spools: list[Spool] = []
        self._image: _Base64 | None = None  # the one that is being read
        self._in_text = False
        self._path: list[str | None] = []
        self._key_comes = False  # the next string is a key
        self._string_start = 0  # in what is kept
        self._tokens = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next piece of the body.

        Raises:
            DecodingError: the body is already known to be unusable.
            OSError: a spool file can't be written.
        """
        self._received += len(chunk)
        if self._received > self._max_bytes:
            raise DecodingError(f"the body is longer than {self._max_bytes:,} bytes")
        chunk = self._rest + chunk
        position = 0
        while position < len(chunk) and (reached := self._scan(chunk, position)) > position:
            position = reached
        self._rest = chunk[position:]

    def finish(self) -> object:
        """Return the whole document, with a `Spool` in the place of each image.

        Raises:
            EarlyEnd: the body ends inside a string, an object or a list.
            DecodingError: the body is not JSON.
        """
        if self._in_text or self._image:
            raise EarlyEnd(f"the body ends inside a string, after {self._received:,} bytes")
        if self._path or not self._received:
            raise EarlyEnd(f"the body ends before its JSON does, after {self._received:,} bytes")
        return _loads(self._kept, iter(self._spools))

    # Each scan takes what it can of chunk[start:] and returns how far it came: `start` if it must see more.

    def _scan(self, chunk: bytes, start: int) -> int:
        if self._image is not None:
            return self._scan_image(chunk, start, self._image)
        return self._scan_text(chunk, start) if self._in_text else self._scan_structure(chunk, start)

    def _scan_structure(self, chunk: bytes, start: int) -> int:
        for found in _TOKEN.finditer(chunk, start):
            self._tokens += 1
            if self._tokens > MAX_TOKENS:
                raise DecodingError(f"the body has more than {MAX_TOKENS:,} parts")
            token = found[0]
            if token == b'"':
                return self._enter_string(chunk, start, found.end())
            if token == b",":
                self._key_comes = bool(self._path) and self._path[-1] is not None
            elif token in b"{[":
                self._path.append("" if token == b"{" else None)
                self._key_comes = token == b"{"
                if len(self._path) > MAX_DEPTH:
                    raise DecodingError(f"the body is nested more than {MAX_DEPTH} levels deep")
            elif token == b"N":
                raise DecodingError("the body is not JSON: NaN, or another N outside a string")
            else:
                self._path = self._path[:-1]
                self._key_comes = False
        self._keep(chunk[start:])
        return len(chunk)

    def _enter_string(self, chunk: bytes, start: int, opened: int) -> int:
        if not self._key_comes and tuple(self._path) in IMAGE_PATHS:
            self._keep(chunk[start : opened - 1] + b"NaN")
            if len(self._spools) == MAX_IMAGES:
                raise DecodingError(f"the body has more than {MAX_IMAGES} images")
            self._image = _Base64()
            self._spools.append(self._image.spool)
        else:
            self._keep(chunk[start:opened])
            self._string_start = len(self._kept) - 1
            self._in_text = True
        return opened

    def _scan_text(self, chunk: bytes, start: int) -> int:
        for found in _TEXT_STOP.finditer(chunk, start):
            if found[0] == b'"':
                self._keep(chunk[start : found.end()])
                if self._key_comes:
                    self._path[-1] = str(_loads(self._kept[self._string_start :], iter(())))
                    self._key_comes = False
                self._in_text = False
                return found.end()
            if found[0] == b"\\":  # the escaped character is in the next chunk
                self._keep(chunk[start : found.start()])
                return found.start()
        self._keep(chunk[start:])
        return len(chunk)

    def _scan_image(self, chunk: bytes, start: int, image: _Base64) -> int:
        stop = min(start + SLICE, len(chunk))
        quote = chunk.find(b'"', start, stop)
        stop = stop if quote < 0 else quote
        escape = chunk.find(b"\\", start, stop)
        stop = stop if escape < 0 else escape
        image.write(chunk[start:stop])
        if escape >= 0:
            return self._scan_image_escape(chunk, escape, image)
        if quote >= 0:
            image.close()
            self._image = None
            return quote + 1
        return stop

    def _scan_image_escape(self, chunk: bytes, start: int, image: _Base64) -> int:
        found = _BASE64_ESCAPE.match(chunk, start)
        if found is None:
            if len(chunk) - start >= _LONGEST_ESCAPE:
                raise DecodingError("an image's base64 has an escape that stands for no base64 character")
            return start
        character = found[1] or chr(int(found[2], 16)).encode(errors="replace")
        image.write(character)
        return found.end()

    def _keep(self, piece: bytes) -> None:
        if len(self._kept) + len(piece) > MAX_KEPT:
            raise DecodingError(f"the body holds more than {MAX_KEPT:,} bytes beside its images")
        self._kept += piece


class _Base64:
    """Decodes base64 in large slices into a spool file."""

    def __init__(self) -> None:
        self.spool = Spool()
        self._pending = bytearray()

    def write(self, text: bytes) -> None:
        self._pending += text
        if len(self._pending) > SLICE:
            # at least one character stays, so that padding, which only the end may have, is never in here
            self._decode((len(self._pending) - 1) // 4 * 4, padding=False)

    def close(self) -> None:
        self._decode(len(self._pending), padding=True)

    def _decode(self, size: int, *, padding: bool) -> None:
        try:
            with memoryview(self._pending)[:size] as text:
                data = pybase64.b64decode(text, validate=True)
        except ValueError:  # binascii.Error, or a character beyond ASCII
            raise DecodingError("an image is not base64") from None
        if not padding and len(data) * 4 != size * 3:
            raise DecodingError("an image's base64 goes on after its padding")
        self.spool.write(data)
        del self._pending[:size]


def _loads(text: bytes | bytearray, spools: Iterator[Spool]) -> object:
    def constant(word: str) -> Spool:
        if word != "NaN":
            raise ValueError(f"{word} is no number")
        return next(spools)

    try:
        return json.loads(text.decode("utf-8-sig"), parse_constant=constant)
    except UnicodeDecodeError:
        raise DecodingError("the body is not UTF-8") from None
    except ValueError as error:
        # without JSONDecodeError's position, which is one in the kept text
        raise DecodingError(f"the body is not JSON: {getattr(error, 'msg', error)}") from None
