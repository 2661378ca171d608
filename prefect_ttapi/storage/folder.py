"""Objects in a local folder, with a bucket's guarantees: whole or absent, created once, replaced as seen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote, urlsplit

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.spool import room_at
from prefect_ttapi.storage.files import forget, make_folder, put, sync_folder, tag_of
from prefect_ttapi.storage.layout import sidecar_key
from prefect_ttapi.storage.objects import (
    PATIENCE,
    Body,
    Condition,
    Facts,
    Found,
    Listed,
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


class Folder:
    """The files below `root`, which is made when first written to.

    Creating is a hard link to a finished file, which fails if the name is taken. Replacing compares and
    renames under a lock. An object's tag is its modification time and size; replacing moves the time strictly
    forward, so that a tag never comes back. What is known of an image is in a hidden folder (`sidecars`).
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
                return file.read(), tag_of(os.fstat(file.fileno()))
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
        if facts is None:
            return None
        tag = tag_of(facts)
        return Found(facts.st_size, _sidecar_metadata(self._root, key, tag), tag, facts.st_mtime)

    def write(
        self,
        key: str,
        body: Body,
        facts: Facts,
        expected: Condition | str = Condition.ANYTHING,
        patience: float = PATIENCE,  # noqa: ARG002 - a folder answers at once
    ) -> str:
        path = self._path(key)
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
        try:
            make_folder(path.parent)
            with body() as source, temporary.open("xb") as target:
                shutil.copyfileobj(source, target, 1024 * 1024)
                target.flush()
                os.fsync(target.fileno())
            tag = put(temporary, path, expected)
            sync_folder(path.parent)
            if facts.metadata:
                _write_sidecar(self._root, key, tag, facts)
        except OSError as error:
            raise self._explained("can't write", key, error) from error
        finally:
            forget(temporary)
        return tag

    def try_writing(self, facts: Facts) -> None:  # noqa: ARG002 - whoever may write may write anything
        temporary, named = (self._root / f".tmp-{secrets.token_hex(8)}" for _ in range(2))
        try:
            make_folder(self._root)
            temporary.touch(exist_ok=False)
            put(temporary, named, Condition.NOTHING)
        except OSError as error:
            raise self._explained("can't write", temporary.name, error) from error
        finally:
            forget(temporary)
            forget(named)

    def room(self) -> int | None:
        try:
            return room_at(self._root)
        except OSError:
            return None

    def copy(
        self, source: ObjectStore, source_key: str, key: str, facts: Facts, expected: Condition
    ) -> str | None:
        del source, source_key, key, facts, expected  # there is no server that could copy
        return None

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
            (self._root / sidecar_key(key)).unlink(missing_ok=True)
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
        forget(path)

    def _walk(self, top: Path, wanted: Callable[[str], bool]) -> Iterator[Listed]:
        """Yield files below `top` whose names are wanted; one that goes while it is listed is left out."""
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
                            yield Listed(key, facts.st_size, tag_of(facts), facts.st_mtime)
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


def _is_object(name: str) -> bool:
    return not reserved(name)


def _is_temporary(name: str) -> bool:
    return _TEMPORARY.fullmatch(name) is not None


def _facts(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _write_sidecar(root: Path, key: str, tag: str, facts: Facts) -> None:
    """Describe the object that has this tag."""
    path = root / sidecar_key(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {name: value for name, value in asdict(facts).items() if value}
    # beside the object, where what a killed process leaves behind is looked for
    temporary = (root / key).with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        temporary.write_text(json.dumps({"tag": tag, **said}, ensure_ascii=False, indent=1), "utf-8")
        temporary.replace(path)
    finally:
        forget(temporary)


def _sidecar_metadata(root: Path, key: str, tag: str) -> Mapping[str, str]:
    """Return the metadata of the object that has this tag; empty where none is kept."""
    try:
        found = json.loads((root / sidecar_key(key)).read_bytes())
        metadata = dict(found["metadata"]) if found["tag"] == tag else {}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}
    return {str(name): str(value) for name, value in metadata.items()}
