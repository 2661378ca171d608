"""Objects in a local folder, with a bucket's guarantees: whole or absent, created once, replaced as seen."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote, urlsplit

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.spool import Body, room_at
from prefect_ttapi.stopping import backoff
from prefect_ttapi.storage.layout import sidecar_key
from prefect_ttapi.storage.objects import (
    Condition,
    ConflictError,
    Facts,
    Found,
    Listed,
    NoAnswerError,
    NoConditionsError,
    ObjectStore,
    checked_key,
    reserved,
)

_ADVICE: Final[Mapping[int, str]] = {
    errno.EACCES: "permission denied: choose a folder that this user may write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.ENOTDIR: "a file is in the way where a folder should be: choose another folder",
    errno.EEXIST: "a file is in the way where a folder should be: choose another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system: shorten the key",
}

#: What `write` and its like call a file that is not finished; other programs' files are not ours to tidy away.
_TEMPORARY: Final = re.compile(r"\.tmp-[0-9a-f]{16}")

#: Seconds to wait for another process to finish replacing an object: it holds the lock for less than a
#: millisecond.
_LOCK_TIMEOUT: Final = 10.0

#: What os.link says on file systems without hard links: without them no process can win a race for sure.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True)
class Folder(ObjectStore):
    """The files below `root`; that folder is made by the first write.

    Creating is a hard link to a finished file, which fails if the name is taken. Replacing compares and
    renames under a lock. An object's tag is its modification time and size; replacing moves the time strictly
    forward, so that a tag never comes back. What is known of an image is in a hidden folder (`sidecars`).
    """

    root: Path

    def uri(self, key: str) -> str:
        return self._path(key).as_uri()

    def key(self, uri: str) -> str:
        parts = urlsplit(uri)
        path = Path(unquote(parts.path))
        if parts.scheme != "file" or parts.query or parts.fragment or not path.is_relative_to(self.root):
            raise StoreError(f"{uri} is not in the folder {self.root}")
        return checked_key(path.relative_to(self.root).as_posix())

    def read(self, key: str) -> tuple[bytes, str] | None:
        with self._if_there("can't read", key), self._path(key).open("rb") as file:
            return file.read(), _tag_of(os.fstat(file.fileno()))
        return None

    def fetch(self, key: str) -> Body:
        if self.look(key) is None:
            raise ImageMissingError(f"there is no {self._path(key)}")
        return partial(self._open, key)

    def _open(self, key: str) -> BinaryIO:
        with self._explaining("can't read", key):
            return self._path(key).open("rb")

    def digest(self, key: str) -> tuple[int, str] | None:
        with self._if_there("can't read", key), self._path(key).open("rb") as file:
            digest = hashlib.file_digest(file, hashlib.sha256)
            return file.tell(), digest.hexdigest()
        return None

    def look(self, key: str) -> Found | None:
        with self._if_there("can't look at", key):
            facts = self._path(key).stat()
            tag = _tag_of(facts)
            return Found(facts.st_size, self._metadata(key, tag), tag, facts.st_mtime)
        return None

    def write(
        self, key: str, body: Body, facts: Facts, expected: Condition | str = Condition.ANYTHING
    ) -> str:
        with self._explaining("can't write", key):
            tag = _put(self._path(key), body, expected)
            if facts.metadata:
                self._describe(key, tag, facts)
            return tag

    def room(self) -> int | None:
        with suppress(OSError):
            return room_at(self.root)
        return None

    def delete(self, key: str) -> None:
        with self._explaining("can't delete", key):
            self._path(key).unlink(missing_ok=True)
            (self.root / sidecar_key(key)).unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[Listed]:
        inside = prefix.rpartition("/")[0]
        return self._walk(self._path(inside) if inside else self.root, prefix)

    def half_written(self) -> Iterator[Listed]:
        return self._walk(self.root, unfinished=True)

    def delete_half_written(self, key: str) -> None:
        path = self.root / key
        if not _TEMPORARY.fullmatch(path.name) or not path.resolve().is_relative_to(self.root.resolve()):
            raise StoreError(f"{path} is no half-written object of this folder")
        _forget(path)

    def _walk(self, top: Path, prefix: str = "", *, unfinished: bool = False) -> Iterator[Listed]:
        """Yield objects below `top`, or unfinished files; a file that is removed meanwhile is left out.

        Args:
            top: leads to all keys that begin with `prefix`.
            prefix: no folder is opened, and no file looked at, whose key begins otherwise.
        """
        for folder, below, names in os.walk(top, onerror=self._not_listed, followlinks=True):
            inside = Path(folder).relative_to(self.root).as_posix() + "/" if Path(folder) != self.root else ""
            below[:] = [
                name for name in below if not reserved(name) and f"{inside}{name}/".startswith(prefix)
            ]
            wanted = [
                name for name in names if (_TEMPORARY.fullmatch(name) if unfinished else not reserved(name))
            ]
            for path in (Path(folder, name) for name in wanted if f"{inside}{name}".startswith(prefix)):
                with self._if_there("can't list", folder):
                    facts = path.stat()
                    key = path.relative_to(self.root).as_posix()
                    yield Listed(key, facts.st_size, _tag_of(facts), facts.st_mtime)

    def _not_listed(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # gone since it was listed, or nothing written yet
            raise self._explained("can't list", error.filename, error) from error

    def presign(self, key: str, seconds: int) -> str:  # noqa: ARG002
        raise StoreError(
            f"{self._path(key)} is in a local folder, which can't sign addresses: use an S3 store"
        )

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    @contextmanager
    def _explaining(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explained(doing, key, error) from error

    @contextmanager
    def _if_there(self, doing: str, key: str) -> Iterator[None]:
        """Explain failures within the block, and end it where there is no such file."""
        try:
            yield
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._explained(doing, key, error) from error

    def _explained(self, doing: str, key: str, error: OSError) -> StoreError:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        return StoreError(f"{doing} {self.root / key}: {advice}")

    def _describe(self, key: str, tag: str, facts: Facts) -> None:
        """Keep the facts about the object that has this tag."""
        path = self.root / sidecar_key(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        said = {name: value for name, value in asdict(facts).items() if value}
        # beside the object, where what a killed process leaves behind is looked for
        temporary = _temporary_beside(self.root / key)
        try:
            temporary.write_text(json.dumps({"tag": tag, **said}, ensure_ascii=False, indent=1), "utf-8")
            temporary.replace(path)
        finally:
            _forget(temporary)

    def _metadata(self, key: str, tag: str) -> Mapping[str, str]:
        """Return the metadata of the object that has this tag; empty where none is kept."""
        try:
            found = json.loads((self.root / sidecar_key(key)).read_bytes())
            metadata = dict(found["metadata"]) if found["tag"] == tag else {}
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return {}
        return {str(name): str(value) for name, value in metadata.items()}


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".tmp-{secrets.token_hex(8)}")


def _tag_of(facts: os.stat_result) -> str:
    """Return modification time and size, which change with every write."""
    return f"{facts.st_mtime_ns:x}-{facts.st_size:x}"


def _put(path: Path, body: Body, expected: Condition | str) -> str:
    """Write a file, and give it its name if the file there now is as expected; return the new file's tag.

    Raises:
        ConflictError: it is not.
        NoAnswerError: another process keeps the folder locked.
    """
    temporary = _temporary_beside(path)
    try:
        _make_folder(path.parent)
        with body() as source, temporary.open("xb") as target:
            shutil.copyfileobj(source, target, 1024 * 1024)
            target.flush()
            os.fsync(target.fileno())
        # the tag of what was written here: by now the name may hold a later write
        tag = _tag_of(temporary.stat())
        if isinstance(expected, str):
            tag = _replace(temporary, path, expected)
        elif expected is Condition.NOTHING:
            _create(temporary, path)
        else:
            temporary.replace(path)
        _sync_folder(path.parent)
        return tag
    finally:
        _forget(temporary)


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
        raise NoConditionsError(f"the file system at {path} has no hard links") from error


def _replace(temporary: Path, path: Path, expected: str) -> str:
    with _locked(path.parent):
        try:
            seen = path.stat()
        except FileNotFoundError:
            raise ConflictError(f"{path} is gone") from None
        if _tag_of(seen) != expected:
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
            return _tag_of(facts)
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


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, with each name on the disk."""
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
    """Remove a temporary file, if it is there."""
    with suppress(OSError):  # its folder could not be made: the error that says so is on its way
        temporary.unlink(missing_ok=True)
