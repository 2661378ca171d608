"""Bytes of one image, kept in an anonymous temporary file instead of memory.

A file that has no name needs no cleaning up: it is gone with its last handle, also after a kill.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, Self

#: Bytes up to which an image stays in memory: a file would cost more than they do.
IN_MEMORY = 64 * 1024


#: Opens a new reader over an image's bytes, or an object's, as often as wanted.
Body = Callable[[], BinaryIO]


class Spool:
    """A file that is written once, in one thread, and then read as often as wanted, in any thread.

    Args:
        hashing: hash the bytes while they are written; otherwise only when the hash is asked for.
        in_memory: bytes up to which no file is made.

    >>> spool = Spool.of([b"ima", b"ge"])
    >>> spool.size_bytes, spool.read_bytes(), spool.open().read(2)
    (5, b'image', b'im')
    """

    def __init__(self, *, hashing: bool = True, in_memory: int = IN_MEMORY) -> None:
        self._in_memory = in_memory
        self._memory = bytearray()
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256() if hashing else None
        self.size_bytes = 0

    @classmethod
    def of(cls, pieces: Iterable[bytes | memoryview], *, hashing: bool = True) -> Self:
        """Return a spool of all of `pieces`."""
        spool = cls(hashing=hashing)
        for piece in pieces:
            spool.write(piece)
        return spool

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`."""
        if self._digest is not None:
            self._digest.update(data)
        self.size_bytes += len(data)
        if self._file is None and self.size_bytes <= self._in_memory:
            self._memory += data
            return
        if self._file is None:
            # unbuffered, so that readers, who go by position, see every byte
            with tempfile.TemporaryFile(prefix="ttapi-", buffering=0) as unnamed:
                file = _Anonymous(os.dup(unnamed.fileno()), "rb+")
            _write_out(file, self._memory)
            self._file = file
            self._memory = bytearray()
        _write_out(self._file, data)

    @property
    def sha256(self) -> str:
        """Return the hex SHA-256 of the bytes written so far."""
        if self._digest is not None:
            return self._digest.hexdigest()
        digest = hashlib.sha256()
        with self.open() as file:
            while chunk := file.read(IN_MEMORY):
                digest.update(chunk)
        return digest.hexdigest()

    def open(self) -> BinaryIO:
        """Return a new reader with a position of its own; it outlives the spool."""
        if self._file is None:
            return io.BytesIO(self._memory)
        return io.BufferedReader(_Reader(self._file, self.size_bytes), 256 * 1024)

    def read_bytes(self) -> bytes:
        """Return all bytes."""
        return self.read_at(0, self.size_bytes)

    def read_at(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on, or fewer at the end; another thread may still be writing."""
        memory, file = self._memory, self._file
        return bytes(memory[start : start + size]) if file is None else os.pread(file.fileno(), size, start)

    def head(self, size: int) -> bytes:
        """Return the first `size` bytes, or all where there are fewer."""
        return self.read_at(0, size)


def check_room(size: int) -> None:
    """Check that temporary files can hold `size` bytes.

    Raises:
        OSError: no temporary file can be written, or not that much.
    """
    Spool().write(bytes(IN_MEMORY + 1))
    room = room_at(Path(tempfile.gettempdir()))
    if room is not None and room < size:
        raise OSError(errno.ENOSPC, f"{room:,} bytes are free, {size:,} may be needed")


def room_at(path: Path) -> int | None:
    """Return the free bytes for this user on the disk of a file or folder, which need not exist; None if unknown."""
    while not path.exists() and path != path.parent:
        path = path.parent
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize if usage.f_blocks else None


def _write_out(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data)
    while rest:  # an unbuffered file may take less than it is given
        rest = rest[file.write(rest) :]


class _Anonymous(io.FileIO):
    def __del__(self) -> None:
        self.close()  # by design it lives as long as its last handle: that deserves no ResourceWarning


class _Reader(io.RawIOBase):
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = os.preadv(self._file.fileno(), [buffer], self._position)
        self._position += data
        return data
