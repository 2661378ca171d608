"""Streaming JSON: base64 images go to spool files while the body arrives, the rest to `json`.

The scanner follows strings and brackets, no more: enough to know under which key a string stands, and where a body
that breaks off has its last whole value. A string that is an image, by its key or by how it begins, is decoded on the
way; the rest is kept and, at the end, judged by `json`. In what is kept an image is the word NaN: no string can be
mistaken for it, and a NaN that was sent is refused.

Base64 is read in all its forms: in a `data:` URI, in lines, URL-safe, without padding, escaped twice. Differs from
`json.loads`: one document may follow another; UTF-8 only (one byte-order mark is skipped, other bytes are replaced);
NaN and Infinity are refused; length and nesting are bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import pybase64

from prefect_ttapi.images.spool import Spool

#: Under these keys, in lower case and without dashes, a text is base64, unless it is a URL.
BASE64_KEYS: Final = (
    *("b64json", "b64", "base64", "b64image", "imageb64", "base64image", "imagebase64", "imagebytes"),
    "bytesbase64encoded",
)

MAX_BYTES: Final = 512 * 1024**2
MAX_KEPT: Final = 8 * 1024**2  # bytes of everything but images
MAX_IMAGES: Final = 100  # each takes up to 64 KiB of memory, or a file handle
MAX_TOKENS: Final = 100_000  # brackets, commas and strings: a list costs 64 bytes of memory for 3 of JSON
MAX_DEPTH: Final = 64

SLICE: Final = 256 * 1024  # base64 characters decoded at once

_TOKEN: Final = re.compile(rb'["{}\[\],N]')
_TEXT_STOP: Final = re.compile(rb'\\.|["\\]', re.DOTALL)
_ESCAPE: Final = re.compile(rb'\\(?:(["\\/bfnrt])|u([0-9A-Fa-f]{4}))')
_LONGEST_ESCAPE: Final = len(rb"\u0041")
#: What the one-letter escapes mean for base64; the others are the letter itself.
_LETTERS: Final = {**dict.fromkeys(b"nrt", b" "), **dict.fromkeys(b"bf", b"?")}

#: How many bytes of a string tell whether it is an image, and how one begins: blanks, then `data:` and what that says
#: of itself, or in base64 the first bytes of a PNG, JPEG, GIF, WebP, AVIF or BMP.
_OPENING: Final = 256
_CLOSED: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_WHOLE_TEXT: Final = re.compile(rb'(?:[^"\\]|\\.)*', re.DOTALL)
_DATA_URI: Final = re.compile(rb"\s*data:[^,]{0,150};\s*base64\s*,", re.IGNORECASE)
_IMAGE: Final = re.compile(
    rb"\s*(?:iVBORw0KGgo|[/_]9j[/_]|R0lGOD|UklGR|AAAA..Z0eXB|Qk[0-3][A-Za-z0-9+/_-]{60})"
)
_URL: Final = re.compile(rb"[\s\"'`<]*[a-z][a-z0-9+.-]{0,20}:", re.IGNORECASE)

#: Escapes of JSON or of a URI that may stand inside the text of base64.
_SECOND_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})|\\(.)", re.DOTALL)
_HALF_ESCAPE: Final = re.compile(rb"(?:%[0-9A-Fa-f]?|\\)\Z")
_PLAIN: Final = bytes.maketrans(b"-_", b"+/")


def plain_key(key: str) -> str:
    """Return a key in lower case and without dashes."""
    return key.lower().replace("_", "").replace("-", "")


class DecodingError(ValueError):
    """The body is not in the encoding it claims, not JSON, too large, or holds an image that is not base64."""


class EarlyEnd(DecodingError):  # noqa: N818 - named for what happened
    """The body is the beginning of an answer: perhaps it was cut short on its way."""


class Reading:
    """How far a body is read, for whoever keeps it meanwhile.

    Attributes:
        image: the one whose base64 is being read.
    """

    def __init__(self) -> None:
        self.image: Base64 | None = None


class StreamingJSON:
    """Decodes a JSON body that is fed in pieces of any size; strings that are images become a `Spool`.

    Args:
        max_bytes: the longest body accepted.
        reading: told where it stands.

    >>> decoder = StreamingJSON()
    >>> decoder.feed(b'{"created": 1, "data": [{"b64_json": "aW1h')
    >>> decoder.feed(b'Z2U="}]}')
    >>> (document,), wrong = decoder.finish()
    >>> document["created"], document["data"][0]["b64_json"].read_bytes(), wrong
    (1, b'image', None)
    """

    def __init__(self, max_bytes: int = MAX_BYTES, reading: Reading | None = None) -> None:
        self._max_bytes = max_bytes
        self._reading = reading or Reading()
        self._received = 0
        self._rest = b""  # of the last chunk: the start of an escape, or of a string that may be an image
        self._kept = bytearray()
        self._whole = 0  # bytes of what is kept, up to the end of its last whole value
        self._images: list[Base64] = []
        self._in_text = False
        self._path: list[str | None] = []  # the keys from the top, None for a list
        self._key_comes = False  # the next string is a key
        self._string_start = 0  # in what is kept
        self._tokens = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next piece of the body.

        Raises:
            DecodingError: no more of the body can be read. What came before is not lost: `finish` gives it.
            OSError: a spool file can't be written.
        """
        self._received += len(chunk)
        if self._received > self._max_bytes:
            raise DecodingError(f"the body is longer than {self._max_bytes:,} bytes")
        chunk, self._rest = self._rest + chunk, b""
        position = 0
        while position < len(chunk) and (reached := self._scan(chunk, position)) > position:
            position = reached
        self._rest = chunk[position:]

    def finish(self) -> tuple[list[object], DecodingError | None]:
        """Return the documents, with a `Spool` for each image, and what is wrong with the body, if anything.

        Of a body that breaks off there are the values that came whole. What should be an image and is not base64 is a
        `DecodingError` in its place.
        """
        is_opening = self._rest.startswith(b'"')
        in_string = is_opening or self._in_text or self._reading.image is not None
        early = self._early_end("inside a string") if in_string else self._early_end() if self._path else None
        if is_opening:
            with suppress(DecodingError):  # what came before counts
                self._open(self._rest, 0)
        if self._reading.image is not None:  # all of it may be there, but for the quotation mark
            self._end_image(self._reading.image)
        text = self._kept
        if early is not None:
            text = text[: self._whole]
            text += b"".join(b"]" if key is None else b"}" for key in reversed(self._path))
        documents, wrong = _documents(text, iter(self._images))
        if not documents and wrong is None:
            wrong = self._early_end()
        return documents, early or wrong

    def _early_end(self, where: str = "before its JSON does") -> EarlyEnd:
        return EarlyEnd(f"the body ends {where}, after {self._received:,} bytes")

    # Each scan takes what it can of chunk[start:] and returns how far it came: `start` if it must see more.

    def _scan(self, chunk: bytes, start: int) -> int:
        if self._reading.image is not None:
            return self._scan_image(chunk, start, self._reading.image)
        return self._scan_text(chunk, start) if self._in_text else self._scan_structure(chunk, start)

    def _scan_structure(self, chunk: bytes, start: int) -> int:
        kept = len(self._kept) - start
        for found in _TOKEN.finditer(chunk, start):
            token = found[0]
            if token == b'"':
                self._keep(chunk[start : found.start()])
                return self._scan_opening(chunk, found.start())
            self._tokens += 1
            wrong = self._wrong_with(token)
            if wrong:
                self._keep(chunk[start : found.start()])
                raise DecodingError(wrong)
            if token == b",":
                self._whole = kept + found.start()
                self._key_comes = bool(self._path) and self._path[-1] is not None
                continue
            if token in b"{[":
                self._path.append("" if token == b"{" else None)
                self._key_comes = token == b"{"
            else:
                self._path = self._path[:-1]
                self._key_comes = False
            self._whole = kept + found.end()
        self._keep(chunk[start:])
        return len(chunk)

    def _wrong_with(self, token: bytes) -> str | None:
        if self._tokens > MAX_TOKENS:
            return f"the body has more than {MAX_TOKENS:,} parts"
        if token in b"{[" and len(self._path) == MAX_DEPTH:
            return f"the body is nested more than {MAX_DEPTH} levels deep"
        return "the body is not JSON: NaN, or another N outside a string" if token == b"N" else None

    def _scan_opening(self, chunk: bytes, start: int) -> int:
        # a key is no image
        window = start + 1 + _OPENING
        is_known = self._key_comes or len(chunk) >= window or _CLOSED.match(chunk, start, window)
        return self._open(chunk, start) if is_known else start

    def _open(self, chunk: bytes, start: int) -> int:
        """Go on with a string as an image or as text."""
        self._tokens += 1
        if self._key_comes or not self._is_image(chunk[start + 1 : start + 1 + _OPENING]):
            self._string_start = len(self._kept)
            self._keep(b'"')
            self._in_text = True
            return self._scan_text(chunk, start + 1)
        if len(self._images) == MAX_IMAGES:
            raise DecodingError(f"the body has more than {MAX_IMAGES} images")
        self._keep(b"NaN")
        image = self._reading.image = Base64()
        self._images.append(image)
        return self._scan_image(chunk, start + 1, image)

    def _is_image(self, opening: bytes) -> bool:
        found = _WHOLE_TEXT.match(opening)
        text = _ESCAPE.sub(_meant, found[0]) if found else b""
        if _DATA_URI.match(text) or _IMAGE.match(text):
            return True
        key = next((key for key in reversed(self._path) if key is not None), "")
        return plain_key(key) in BASE64_KEYS and bool(text.strip()) and not _URL.match(text)

    def _scan_text(self, chunk: bytes, start: int) -> int:
        for found in _TEXT_STOP.finditer(chunk, start):
            if found[0] == b'"':
                self._keep(chunk[start : found.end()])
                self._in_text = False
                if self._key_comes:
                    self._path[-1] = _text(self._kept[self._string_start :])
                    self._key_comes = False
                else:
                    self._whole = len(self._kept)
                return found.end()
            if found[0] == b"\\":  # the escaped character is in the next chunk
                self._keep(chunk[start : found.start()])
                return found.start()
        self._keep(chunk[start:])
        return len(chunk)

    def _scan_image(self, chunk: bytes, start: int, image: Base64) -> int:
        stop = min(start + SLICE, len(chunk))
        quote = chunk.find(b'"', start, stop)
        stop = stop if quote < 0 else quote
        escape = chunk.find(b"\\", start, stop)
        image.write(chunk[start : stop if escape < 0 else escape])
        if escape >= 0:
            return self._scan_escapes(chunk, escape, stop, image)
        if quote >= 0:
            self._end_image(image)
            return quote + 1
        return stop

    def _end_image(self, image: Base64) -> None:
        image.close()
        self._reading.image = None  # another event's document goes on with the same reading
        self._whole = len(self._kept)

    def _scan_escapes(self, chunk: bytes, start: int, stop: int, image: Base64) -> int:
        text = chunk[start:stop].removesuffix(b"\\")
        plain = text.replace(b"\\n", b"").replace(b"\\r", b"").replace(b"\\/", b"/")
        if text and b"\\" not in plain:  # all of them at once: there may be one in each line
            image.write(plain, escaped=True)
            return start + len(text)
        found = _ESCAPE.match(chunk, start)
        if found is None:
            if len(chunk) - start < _LONGEST_ESCAPE:
                return start
            image.write(b"?", escaped=True)  # no base64
            return start + 1
        image.write(_meant(found), escaped=True)
        return found.end()

    def _keep(self, piece: bytes) -> None:
        if len(self._kept) + len(piece) > MAX_KEPT:
            raise DecodingError(f"the body holds more than {MAX_KEPT:,} bytes beside its images")
        self._kept += piece


class Base64:
    """Decodes base64 in large slices into a spool file; `damage` tells if it is none.

    Nearly all of it is plain, and taken by a strict decoder at once. The rest is made plain first.

    Attributes:
        is_verbatim: what was decoded so far is what was read, with nothing left out or escaped.
        received, decoded: characters.
    """

    def __init__(self) -> None:
        self.spool = Spool()
        self.damage: DecodingError | None = None
        self.is_verbatim = True
        self.received = self.decoded = 0
        self._pending = bytearray()
        self._is_start = self._is_plain = True

    def write(self, text: bytes, *, escaped: bool = False) -> None:
        """Take the next piece of the text, perhaps one that was escaped in JSON."""
        self.received += len(text)
        self.is_verbatim = self.is_verbatim and not escaped
        if self.damage is None:
            self._pending += text
            if len(self._pending) > SLICE:
                self._decode()

    def close(self) -> None:
        """Take what is left."""
        if self.damage is None:
            self._decode(is_end=True)

    def _decode(self, *, is_end: bool = False) -> None:
        if self._is_start and (found := _DATA_URI.match(self._pending)):
            end = found.end()
            del found, self._pending[:end]
            self.is_verbatim = False
        self._is_start = False
        self._is_plain = self._is_plain and self._decode_plain(is_end)
        self.is_verbatim = self.is_verbatim and self._is_plain
        try:
            if not self._is_plain:
                self._decode_leniently(is_end)
        except ValueError:
            self.damage = DecodingError("an image is not base64")

    def _decode_plain(self, is_end: bool) -> bool:
        # but at the end at least one character stays, so that padding, which only the end may have, is never in here
        size = len(self._pending) if is_end else (len(self._pending) - 1) // 4 * 4
        try:
            with memoryview(self._pending)[:size] as text:
                data = pybase64.b64decode(text, validate=True)
        except ValueError:  # binascii.Error, or a character beyond ASCII
            return False
        if not is_end and len(data) * 4 != size * 3:
            return False
        self.spool.write(data)
        self.decoded += size
        del self._pending[:size]
        return True

    def _decode_leniently(self, is_end: bool) -> None:
        text, half = bytes(self._pending), b""
        if b"%" in text or b"\\" in text:
            found = _HALF_ESCAPE.search(text)
            if found is not None:
                text, half = text[: found.start()], found[0]
            text = _SECOND_ESCAPE.sub(_undone, text)
        *padded, last = text.translate(_PLAIN, b" \t\r\n").split(b"=")  # padding may also end a line
        for part in padded:
            self.spool.write(_decoded(part))
        whole = len(last) if is_end else len(last) // 4 * 4
        self.spool.write(_decoded(last[:whole]))
        self._pending = bytearray(last[whole:] + half)


def _decoded(text: bytes) -> bytes:
    if len(text) % 4 == 1:  # 6 bits are no byte
        pybase64.b64decode(text[-1:] + b"A==", validate=True)
        text = text[:-1]
    return pybase64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def _undone(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode()) if escape[1] else _LETTERS.get(escape[2][0], escape[2])


def _meant(escape: re.Match[bytes]) -> bytes:
    """Return what an escape in JSON stands for, as far as base64 has it."""
    if escape[1]:
        return _LETTERS.get(escape[1][0], escape[1])
    return chr(int(escape[2], 16)).encode(errors="replace")


def _text(string: bytes | bytearray) -> str:
    """Return what a JSON string says; nothing where it is none, which the end of the body will tell."""
    try:
        return str(json.loads(string.decode(errors="replace"), strict=False))
    except ValueError:
        return ""


def _documents(
    text: bytes | bytearray, images: Iterator[Base64]
) -> tuple[list[object], DecodingError | None]:
    """Return the JSON documents in `text`, up to the first that is none, and why it is none."""

    def constant(word: str) -> Spool | DecodingError:
        if word != "NaN":
            raise ValueError(f"{word} is no number")
        image = next(images)
        return image.damage or image.spool

    decoder = json.JSONDecoder(parse_constant=constant, strict=False)
    told = text.decode("utf-8-sig", errors="replace")
    documents: list[object] = []
    position = 0
    while True:
        position += len(told[position:]) - len(told[position:].lstrip(" \t\r\n\x1e"))
        if position == len(told):
            return documents, None
        try:
            document, position = decoder.raw_decode(told, position)
        except ValueError as error:
            # without JSONDecodeError's position, which is one in the kept text
            return documents, DecodingError(f"the body is not JSON: {getattr(error, 'msg', error)}")
        documents.append(document)
