"""A batch's thumbnails, all in one file: a zip beside the manifest, from which a later batch takes them again.

The zip is written as the thumbnails come: pictures as they are, each named after the image it shows. So all entries
have one shape, and reading asks for exactly that shape: anything else in a store is not ours, and no thumbnail.
"""

from __future__ import annotations

import logging
import re
import threading
import zlib
from collections.abc import Iterator
from struct import Struct
from typing import BinaryIO, Final, Self

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Bytes of one thumbnail, and of a zip whose places fit 32 bits; what is more is left out.
LARGEST: Final = 0xFFFF
LARGEST_ZIP: Final = 0xFFFF_FFFF

# the records of a zip, as APPNOTE.TXT has them
_LOCAL: Final = Struct("<4s5H3L2H")
_CENTRAL: Final = Struct("<4s6H3L5H2L")
_END_64: Final = Struct("<4sQ2H2L4Q")
_LOCATOR: Final = Struct("<4sLQL")
_END: Final = Struct("<4s4H2LH")

_NAME: Final = re.compile(rb"[0-9a-f]{64}\.webp")
_NAME_SIZE: Final = 69
_BEFORE: Final = _LOCAL.size + _NAME_SIZE  # in front of each picture
_LISTED: Final = _CENTRAL.size + _NAME_SIZE
_TAIL: Final = _END_64.size + _LOCATOR.size + _END.size
_VERSION: Final = 20
_VERSION_64: Final = 45
_FIRST_OF_1980: Final = 33  # the zero of a zip's clock: equal thumbnails are equal bytes


class _Places(dict[bytes, int]):
    """Where each picture begins, and how long it is, by the image's digest: about 150 bytes each."""

    def put(self, digest: bytes, start: int, size: int) -> None:
        self[digest] = start << 16 | size

    def find(self, sha256: str) -> tuple[bytes, int, int] | None:
        """The name of the picture, its place and its length."""
        name = f"{sha256}.webp".encode(errors="replace")
        place = self.get(bytes.fromhex(sha256)) if _NAME.fullmatch(name) else None
        return None if place is None else (name, place >> 16, place & LARGEST)


class ThumbnailFile:
    """Thumbnails as they come, in a temporary file; added to by one thread.

    >>> thumbnails = ThumbnailFile()
    >>> thumbnails.add("ab" * 32, b"RIFF....WEBP")
    >>> thumbnails.get("ab" * 32), thumbnails.get("cd" * 32)
    (b'RIFF....WEBP', None)
    """

    def __init__(self) -> None:
        self._spool = Spool()
        self._places = _Places()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, sha256: str, webp: bytes) -> None:
        """Keep the thumbnail of an image, the first that comes; what is too much for a zip is left out."""
        name = f"{sha256}.webp".encode(errors="replace")
        start = self._spool.size_bytes + _BEFORE
        full = start + len(webp) + (len(self) + 1) * _LISTED + _TAIL > LARGEST_ZIP
        if full or len(webp) > LARGEST or not _NAME.fullmatch(name) or self._places.find(sha256):
            return
        header = _LOCAL.pack(b"PK\3\4", _VERSION, *_facts(zlib.crc32(webp), len(webp)))
        self._spool.write(header + name + webp)
        self._places.put(bytes.fromhex(sha256), start, len(webp))

    def get(self, sha256: str) -> bytes | None:
        """The thumbnail of an image, or None."""
        found = self._places.find(sha256)
        return self._spool.read_at(found[1], found[2]) if found else None

    def zipped(self) -> Spool:
        """The whole as a zip, to be read; nothing can be added any more."""
        start = self._spool.size_bytes
        for listed in self._directory():
            self._spool.write(listed)
        self._spool.write(_end(start, self._spool.size_bytes - start, len(self)))
        return self._spool

    def _directory(self) -> Iterator[bytes]:
        for digest, place in self._places.items():
            begin = (place >> 16) - _BEFORE
            crc = _LOCAL.unpack(self._spool.read_at(begin, _LOCAL.size))[6]
            facts = _facts(crc, place & LARGEST)
            yield _CENTRAL.pack(b"PK\1\2", _VERSION, _VERSION, *facts, 0, 0, 0, 0, begin) + (
                f"{digest.hex()}.webp".encode()
            )


class ThumbnailPack:
    """The thumbnails that an earlier batch left in a store; from any thread, to be closed.

    Args:
        file: of the zip, which is then this object's own.

    Raises:
        ValueError: it is no zip as `ThumbnailFile` writes it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._places = _Places()
        for digest, start, size in _listed(file):
            self._places.put(digest, start, size)

    @classmethod
    def of(cls, store: ImageStore, uri: str) -> Self | None:
        """The pack at `uri` in `store`; None where there is none, or none that can be used."""
        try:
            if (store.size(uri) or 0) > LARGEST_ZIP:
                return None
            file = store.open(uri)
        except ImageMissingError:
            return None
        except StoreError as error:
            logger.warning("The thumbnails of an earlier batch can't be read: %s", error)
            return None
        try:
            return cls(file)
        except (ValueError, OSError) as error:
            file.close()
            logger.warning("The thumbnails in %s can't be used: %s", uri, error)
            return None

    def get(self, sha256: str) -> bytes | None:
        """The thumbnail of an image; None where there is none, or a damaged one."""
        found = self._places.find(sha256)
        if found is None:
            return None
        name, start, size = found
        try:
            with self._lock:
                self._file.seek(start - _BEFORE)
                entry = self._file.read(_BEFORE + size)
        except OSError:
            return None
        webp = entry[_BEFORE:]
        expected = _LOCAL.pack(b"PK\3\4", _VERSION, *_facts(zlib.crc32(webp), size)) + name
        is_webp = webp[:4] == b"RIFF" and webp[8:12] == b"WEBP"
        return webp if is_webp and entry[:_BEFORE] == expected else None

    def close(self) -> None:
        """Forget them."""
        self._file.close()


def _facts(crc: int, size: int) -> tuple[int, ...]:
    """What both records of an entry say of it: neither encrypted nor compressed, nothing beside its name."""
    return 0, 0, 0, _FIRST_OF_1980, crc, size, size, _NAME_SIZE, 0


def _end(start: int, size: int, count: int) -> bytes:
    """The records after the directory. Those with 64 bits, for over 65,535 entries, are always there: one shape."""
    return (
        _END_64.pack(b"PK\6\6", _END_64.size - 12, _VERSION_64, _VERSION_64, 0, 0, count, count, size, start)
        + _LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
        + _END.pack(b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), size, start, 0)
    )


def _listed(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Digest, place and length of every entry of ours that the directory names."""
    end = file.seek(0, 2) - _TAIL
    if not 0 <= end <= LARGEST_ZIP:
        raise ValueError(f"{end + _TAIL:,} bytes are no zip of thumbnails")
    file.seek(end)
    tail = file.read(_TAIL)
    *_, count, size, start = _END_64.unpack(tail[: _END_64.size])
    if start + size != end or count * _LISTED != size or tail != _end(start, size, count):
        raise ValueError("it is no zip of thumbnails")
    file.seek(start)
    for _ in range(count):
        record = file.read(_LISTED)
        if len(record) < _LISTED:
            raise ValueError("it became shorter while it was read")
        crc, length, *_, begin = _CENTRAL.unpack(record[: _CENTRAL.size])[7:]
        name = record[_CENTRAL.size :]
        facts = _facts(crc, length)
        whole = _CENTRAL.pack(b"PK\1\2", _VERSION, _VERSION, *facts, 0, 0, 0, 0, begin) + name
        if (
            record == whole
            and length <= LARGEST
            and begin + length + _BEFORE <= start
            and _NAME.fullmatch(name)
        ):
            yield bytes.fromhex(name[:64].decode()), begin + _BEFORE, length
