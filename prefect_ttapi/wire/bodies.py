"""Undoing a body's Content-Encoding piece by piece, in bounded memory (sans-IO)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

_PIECE: Final = 64 * 1024

#: zlib's window argument: 15 bits, with a gzip header, or with the zlib header that "deflate" means.
_GZIP, _ZLIB = 31, 15


class BodyError(ValueError):
    """The body is not in the encoding it claims, or in none that was asked for."""


class BodyEndsEarly(BodyError):  # noqa: N818 - named for what it says
    """The body is the beginning of compressed data: perhaps it was cut short on its way."""


def decoded(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """The body's own bytes, from `chunks` as they come from the network.

    Identity is what we ask for; gzip and deflate are undone all the same, a little at a time, so that a small
    body can't fill the memory.

    Raises:
        BodyError: another encoding, or damaged data.
        BodyEndsEarly: the data is incomplete.
    """
    if encoding.strip().lower() not in _ENCODINGS:
        raise BodyError("the body has a Content-Encoding that was not asked for")
    return _ENCODINGS[encoding.strip().lower()](chunks)


def _inflated(chunks: Iterable[bytes], window: int) -> Iterator[bytes]:
    inflate = zlib.decompressobj(window)
    for chunk in chunks:
        rest = chunk
        while rest:
            if inflate.eof:  # gzip files may follow one another
                inflate = zlib.decompressobj(window)
            more = True
            while more and not inflate.eof:
                piece = _inflate(inflate, rest)
                rest = inflate.unconsumed_tail
                more = len(piece) == _PIECE
                yield piece
            rest = inflate.unused_data
    if not inflate.eof:
        raise BodyEndsEarly("the compressed body ends early")


def _inflate(inflate: zlib._Decompress, data: bytes) -> bytes:
    try:
        return inflate.decompress(data, _PIECE)
    except zlib.error:
        raise BodyError("the compressed body is damaged") from None


_ENCODINGS: Final[Mapping[str, Callable[[Iterable[bytes]], Iterator[bytes]]]] = {
    **dict.fromkeys(("", "identity"), iter),
    **dict.fromkeys(("gzip", "x-gzip"), lambda chunks: _inflated(chunks, _GZIP)),
    "deflate": lambda chunks: _inflated(chunks, _ZLIB),
}
