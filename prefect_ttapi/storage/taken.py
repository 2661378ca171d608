"""Which keys are taken, so that no image is put where another one is to be."""

from __future__ import annotations

import hashlib
import re


class TakenKeys:
    """Keys and whose they are, in some 200 bytes each, however long they are.

    A bucket could hold keys that differ in case only, or a key below another one; a folder on some systems could
    not: what works in one place is to work in the other.

    >>> taken = TakenKeys()
    >>> taken.take("a.png", "one", 0), taken.take("a.png", "one", 1)
    (None, None)
    >>> taken.take("A.png", "another", 2)
    'its key A.png is also that of another image, of request 0'
    """

    def __init__(self) -> None:
        self._owners: dict[bytes, tuple[int, bytes]] = {}
        self._folders: dict[bytes, int] = {}

    def take(self, key: str, image: str, row: int) -> str | None:
        """Why `key` can't be this image's, or None: it is then taken. The same image may take it again."""
        path, owner = key.lower(), _digest(image)
        name, folders = _digest(path), [_digest(path[: slash.start()]) for slash in re.finditer("/", path)]
        if name in self._owners and self._owners[name][1] != owner:
            return f"its key {key} is also that of another image, of request {self._owners[name][0]}"
        if name in self._folders:
            return f"its key {key} is a folder in a key of request {self._folders[name]}"
        blocked = next((folder for folder in folders if folder in self._owners), None)
        if blocked is not None:
            return f"its key {key} needs a folder where request {self._owners[blocked][0]} has an image"
        self._owners.setdefault(name, (row, owner))
        for folder in folders:
            self._folders.setdefault(folder, row)
        return None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()
