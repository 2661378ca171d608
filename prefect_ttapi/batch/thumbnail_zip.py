"""A batch's thumbnails, all in one file: a zip beside the manifest, from which a later batch takes them again.

Pictures are stored as they are, each named after the SHA-256 of the image it shows. A zip in a store is read only where
all of its entries have that one shape: anything else is not ours, and no thumbnail.
"""

from __future__ import annotations

import io
import logging
import os
import re
import tempfile
from typing import BinaryIO, Final, Self
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Bytes of one thumbnail, of a zip, and of the part of it that lists the entries, some 115 each.
LARGEST: Final = 0xFFFF
LARGEST_ZIP: Final = 0xFFFF_FFFF
LARGEST_LIST: Final = 32 * 1024 * 1024

_NAME: Final = re.compile(r"[0-9a-f]{64}\.webp")
_END: Final = 22  # bytes of the record that ends a zip


class ThumbnailPack:
    """The thumbnails that an earlier batch left in a store; safe from all threads. They take 600 bytes of memory each.

    Args:
        file: of the zip; it is closed with the pack.

    Raises:
        ValueError: it is no zip as `ThumbnailFile` writes it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._zip = _opened(file)

    @classmethod
    def of(cls, store: ImageStore, uri: str) -> Self | None:
        """Return the pack at `uri` in `store`, or None where there is none, or none that can be used."""
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
        except ValueError as error:
            file.close()
            logger.warning("The thumbnails in %s can't be used: %s", uri, error)
            return None

    def get(self, sha256: str) -> bytes | None:
        """Return the thumbnail of an image, or None where there is none, or a damaged one."""
        try:
            webp = self._zip.read(f"{sha256}.webp")
        except Exception:  # zipfile raises whatever a damaged file makes it stumble over
            return None
        return webp if webp[:4] == b"RIFF" and webp[8:12] == b"WEBP" else None

    def close(self) -> None:
        """Forget them."""
        self._zip.close()
        self._file.close()


class ThumbnailFile(ThumbnailPack):
    """Thumbnails as they come, in a temporary file; used by one thread. They take 450 bytes of memory each.

    >>> thumbnails = ThumbnailFile()
    >>> thumbnails.add("ab" * 32, b"RIFF....WEBP")
    >>> thumbnails.get("ab" * 32), thumbnails.get("cd" * 32)
    (b'RIFF....WEBP', None)
    >>> thumbnails.close()
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ttapi-")  # noqa: SIM115 - closed by `close`
        self._zip = ZipFile(self._file, "w")

    def __len__(self) -> int:
        return len(self._zip.infolist())

    def add(self, sha256: str, webp: bytes) -> None:
        """Keep the thumbnail of an image, the first that comes; one that is too large is left out."""
        name = f"{sha256}.webp"
        if len(webp) <= LARGEST and _NAME.fullmatch(name) and name not in self._zip.NameToInfo:
            self._zip.writestr(
                ZipInfo(name), webp
            )  # of the zip's first day: equal thumbnails are equal bytes

    def open(self) -> BinaryIO:
        """Return a reader of the whole as a zip, one at a time; nothing can be added any more."""
        if self._zip.mode == "w":
            self._zip.close()
            self._zip = ZipFile(self._file)
        reader = os.fdopen(os.dup(self._file.fileno()), "rb")
        reader.seek(0)
        return reader


def _opened(file: BinaryIO) -> ZipFile:
    try:
        file.seek(-_END, io.SEEK_END)
        ends_well = file.read(4) == b"PK\5\6"
        opened = ZipFile(_Bounded(file))
        entries = opened.infolist()
    except Exception as error:
        raise ValueError(f"it is no zip: {error}") from None
    begins_well = not entries or entries[0].header_offset == 0
    if not (begins_well and ends_well and all(map(_is_ours, entries))):
        raise ValueError("it is no zip of thumbnails")
    return opened


def _is_ours(entry: ZipInfo) -> bool:
    stored = entry.compress_type == ZIP_STORED and entry.compress_size == entry.file_size <= LARGEST
    plain = not (entry.flag_bits or entry.extra or entry.comment) and entry.date_time == (1980, 1, 1, 0, 0, 0)
    return stored and plain and bool(_NAME.fullmatch(entry.filename))


class _Bounded:
    """A file that gives at most so much at once: a zip's list is read as a whole, however long it says it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, LARGEST_LIST) if size >= 0 else LARGEST_LIST)
