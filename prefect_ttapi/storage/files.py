"""Files that are whole or absent: named once they are finished, created once, replaced as seen."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prefect_ttapi.errors import StoreError
from prefect_ttapi.stopping import backoff
from prefect_ttapi.storage.objects import Condition, ConflictError, NoAnswerError

#: Seconds to wait for another process to finish replacing an object: it holds the lock for less than a
#: millisecond.
_LOCK_TIMEOUT: Final = 10.0

#: What os.link says on file systems without hard links: without them no process can win a race for sure.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def put(temporary: Path, path: Path, expected: Condition | str) -> str:
    """Give a finished file its name, if what has the name now is as expected; return the tag of what was written.

    Raises:
        ConflictError: it is not.
        NoAnswerError: another process keeps the folder locked.
    """
    if isinstance(expected, str):
        return _replace(temporary, path, expected)
    # the tag of what was written here: by now the name may hold a later write
    tag = tag_of(temporary.stat())
    _PUT[expected](temporary, path)
    return tag


def tag_of(facts: os.stat_result) -> str:
    """Return modification time and size, which change with every write."""
    return f"{facts.st_mtime_ns:x}-{facts.st_size:x}"


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
        if tag_of(seen) != expected:
            raise ConflictError(f"{path} has changed")
        tag = _be_newer(temporary, seen.st_mtime_ns)
        temporary.replace(path)
        return tag


def _be_newer(path: Path, than: int) -> str:
    """Move the modification time past `than` ns, in steps that any file system notices; return the new tag."""
    for step in (1, 1_000, 1_000_000, 2_000_000_000):
        now = max(time.time_ns(), than + step)
        os.utime(path, ns=(now, now))
        if (facts := path.stat()).st_mtime_ns > than:
            return tag_of(facts)
    raise StoreError(
        f"can't write {path}: the file system keeps no modification times; choose another folder"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # flock, not lockf: a POSIX lock is dropped when any handle of the process on the file is closed
    with (folder / ".lock").open("ab") as lock:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        for pause in backoff(0.001, 0.01):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NoAnswerError(f"{folder} stays locked by another process") from None
                time.sleep(pause)
        yield


def make_folder(folder: Path) -> None:
    """Make a folder and what is above it, each name on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Put a new name on the disk, not only the bytes behind it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget(temporary: Path) -> None:
    """Remove a temporary file, if it is there."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        return  # its folder could not be made: the error that says so is on its way
