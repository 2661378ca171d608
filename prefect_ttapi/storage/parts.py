"""A body cut into the parts it is uploaded in, each with the MD5 that S3 checks it against on arrival."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final

from prefect_ttapi.storage.objects import Body

#: Bytes of a part; S3 takes at least 5 MiB, and at most 10,000 parts.
PART_SIZE: Final = 8 * 1024 * 1024

_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True)
class Part:
    """`length` bytes from `start` on, and their MD5."""

    start: int
    length: int
    md5: bytes

    @property
    def content_md5(self) -> str:
        """As the header of this name takes it."""
        return base64.b64encode(self.md5).decode()

    @contextmanager
    def open(self, body: Body) -> Iterator[BinaryIO]:
        """A reader over this part alone, that reads from the body as it goes."""
        with body() as whole:
            yield io.BufferedReader(_Window(whole, self.start, self.length), _CHUNK)


def parts_of(body: Body, whole_up_to: int, part_size: int = PART_SIZE) -> list[Part]:
    """The body in parts of 8 MiB; one that has at most `whole_up_to` bytes is one part."""
    with body() as reader:
        size = reader.seek(0, io.SEEK_END)
        step = size if size <= whole_up_to else part_size
        starts = range(0, size, step) if size else (0,)
        return [_read(reader, start, min(step, size - start)) for start in starts]


def size_of(parts: Sequence[Part]) -> int:
    """Bytes of all parts."""
    return sum(part.length for part in parts)


def plain_tag(parts: Sequence[Part]) -> str:
    """The tag that a service gives an object that it has kept unencrypted, or under its own keys."""
    if len(parts) == 1:
        return parts[0].md5.hex()
    return f"{_md5(b''.join(part.md5 for part in parts)).hexdigest()}-{len(parts)}"


def _read(reader: BinaryIO, start: int, length: int) -> Part:
    digest, left = _md5(), length
    reader.seek(start)
    while left and (chunk := reader.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    return Part(start, length, digest.digest())


def _md5(data: bytes = b"") -> hashlib._Hash:
    # against accidents on the way, which is all that S3 offers it for
    return hashlib.md5(data, usedforsecurity=False)


class _Window(io.RawIOBase):
    """A part of a file, as if it were all of it."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._start + self._at)
        data = self._file.read(min(len(buffer), max(0, self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
