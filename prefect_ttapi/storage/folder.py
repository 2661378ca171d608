"""Objects in a local folder, with a bucket's guarantees: whole or absent, created once, replaced as seen."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote, urlsplit

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.storage.objects import (
    PATIENCE,
    Body,
    Condition,
    ConflictError,
    Facts,
    Found,
    Listed,
    NoAnswerError,
    ObjectStore,
    checked_key,
    reserved,
)

#: Seconds to wait for another process to finish replacing an object: it holds the lock for less than a
#: millisecond.
_LOCK_TIMEOUT: Final = 10.0

_ADVICE: Final[Mapping[int, str]] = {
    errno.EACCES: "permission denied: choose a folder that this user may write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.ENOTDIR: "a file is in the way where a folder should be: choose another folder",
    errno.EEXIST: "a file is in the way where a folder should be: choose another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system: shorten the key",
}
#: What os.link says on file systems without hard links: without them no process can win a race for sure.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class Folder:
    """The files below `root`, which is made when first written to.

    Creating is a hard link to a finished file, which fails if the name is taken. Replacing compares and
    renames under a lock. An object's tag is its modification time and size; replacing moves the time strictly
    forward, so that a tag never comes back.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def uri(self, key: str) -> str:
        return self._path(key).as_uri()

    def key(self, uri: str) -> str:
        parts = urlsplit(uri)
        path = Path(unquote(parts.path))
        if parts.scheme != "file" or parts.query or parts.fragment or not path.is_relative_to(self._root):
            raise StoreError(f"{uri} is not in the folder {self._root}")
        return checked_key(path.relative_to(self._root).as_posix())

    def read(self, key: str) -> tuple[bytes, str] | None:
        try:
            with self._path(key).open("rb") as file:
                return file.read(), _tag(os.fstat(file.fileno()))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._explained("can't read", key, error) from error

    def fetch(self, key: str) -> Body:
        path = self._path(key)
        if self.sizes([key]) == [None]:
            raise ImageMissingError(f"there is no {path}")
        return partial(self._open, key)

    def _open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except OSError as error:
            raise self._explained("can't read", key, error) from error

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [facts and facts.st_size for facts in map(self._stat, keys)]

    def _stat(self, key: str) -> os.stat_result | None:
        try:
            return self._path(key).stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._explained("can't look at", key, error) from error

    def digest(self, key: str) -> tuple[int, str] | None:
        try:
            with self._path(key).open("rb") as file:
                digest = hashlib.file_digest(file, hashlib.sha256)
                return file.tell(), digest.hexdigest()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._explained("can't read", key, error) from error

    def look(self, key: str) -> Found | None:
        facts = self._stat(key)
        return facts and Found(facts.st_size, {}, _tag(facts))

    def write(
        self,
        key: str,
        body: Body,
        facts: Facts,  # noqa: ARG002 - a folder keeps bytes only
        expected: Condition | str = Condition.ANYTHING,
        patience: float = PATIENCE,  # noqa: ARG002 - a folder answers at once
    ) -> str:
        path = self._path(key)
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
        try:
            _make_folder(path.parent)
            with body() as source, temporary.open("xb") as target:
                shutil.copyfileobj(source, target, 1024 * 1024)
                target.flush()
                os.fsync(target.fileno())
            if isinstance(expected, str):
                tag = _replace(temporary, path, expected)
            else:
                # the tag of what was written here: by now the name may hold a later write
                tag = _tag(temporary.stat())
                _PUT[expected](temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise self._explained("can't write", key, error) from error
        finally:
            _forget(temporary)
        return tag

    def try_writing(self, facts: Facts) -> None:  # noqa: ARG002 - whoever may write may write anything
        temporary = self._root / f".tmp-{secrets.token_hex(8)}"
        try:
            _make_folder(self._root)
            temporary.touch(exist_ok=False)
        except OSError as error:
            raise self._explained("can't write", temporary.name, error) from error
        finally:
            _forget(temporary)

    def copy(
        self, source: ObjectStore, source_key: str, key: str, facts: Facts, expected: Condition
    ) -> str | None:
        del source, source_key, key, facts, expected  # there is no server that could copy
        return None

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._explained("can't delete", key, error) from error

    def list(self, prefix: str) -> Iterator[Listed]:
        inside = prefix.rpartition("/")[0]
        for found in self._walk(self._path(inside) if inside else self._root, _is_object):
            if found.key.startswith(prefix):
                yield found

    def half_written(self) -> Iterator[Listed]:
        return self._walk(self._root, _is_temporary)

    def delete_half_written(self, key: str) -> None:
        path = self._root / key
        if not _is_temporary(path.name) or not path.resolve().is_relative_to(self._root.resolve()):
            raise StoreError(f"{path} is no half-written object of this folder")
        _forget(path)

    def _walk(self, top: Path, wanted: Callable[[str], bool]) -> Iterator[Listed]:
        """Files below `top` whose names are wanted; what goes while it is listed is left out."""
        folders = [top]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        path = Path(entry.path)
                        if entry.is_dir() and not reserved(entry.name):
                            folders.append(path)
                        elif wanted(entry.name) and (facts := _facts(path)):
                            key = path.relative_to(self._root).as_posix()
                            yield Listed(key, facts.st_size, _tag(facts), facts.st_mtime)
            except FileNotFoundError:
                continue  # gone since it was listed, or nothing written yet
            except OSError as error:
                where = folder.relative_to(self._root).as_posix()
                raise self._explained("can't list", where, error) from error

    def presign(self, key: str, seconds: int) -> str:  # noqa: ARG002
        raise StoreError(
            f"{self._path(key)} is in a local folder, which can't sign addresses: use an S3 store"
        )

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    def _explained(self, doing: str, key: str, error: OSError) -> StoreError:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        return StoreError(f"{doing} {self._root / key}: {advice}")


def _tag(facts: os.stat_result) -> str:
    return f"{facts.st_mtime_ns:x}-{facts.st_size:x}"


def _is_object(name: str) -> bool:
    return not reserved(name)


def _is_temporary(name: str) -> bool:
    return name.startswith(".tmp-")


def _facts(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _create(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # over NFS a link whose answer was lost is tried again and then meets itself
        if temporary.stat().st_nlink != 2:
            raise ConflictError(f"{path} is there already") from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise StoreError(
            f"can't write {path}: the file system has no hard links, which the store needs to pay once; "
            "choose another folder"
        ) from error


#: How a finished file gets its name.
_PUT: Final[Mapping[Condition, Callable[[Path, Path], object]]] = {
    Condition.ANYTHING: Path.replace,
    Condition.NOTHING: _create,
}


def _replace(temporary: Path, path: Path, expected: str) -> str:
    with _locked(path.parent):
        try:
            seen = path.stat()
        except FileNotFoundError:
            raise ConflictError(f"{path} is gone") from None
        if _tag(seen) != expected:
            raise ConflictError(f"{path} has changed")
        tag = _be_newer(temporary, seen.st_mtime_ns)
        temporary.replace(path)
        return tag


def _be_newer(path: Path, than: int) -> str:
    """Move the modification time past `than` ns, in steps that any file system notices; the new tag."""
    for step in (1, 1_000, 1_000_000, 2_000_000_000):
        now = max(time.time_ns(), than + step)
        os.utime(path, ns=(now, now))
        if (facts := path.stat()).st_mtime_ns > than:
            return _tag(facts)
    raise StoreError(
        f"can't write {path}: the file system keeps no modification times; choose another folder"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # flock, not lockf: a POSIX lock is dropped when any handle of the process on the file is closed
    with (folder / ".lock").open("ab") as lock:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NoAnswerError(f"{folder} stays locked by another process") from None
                time.sleep(0.001)
        yield


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk, not only the bytes behind it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _forget(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        return  # its folder could not be made: the error that says so is on its way
