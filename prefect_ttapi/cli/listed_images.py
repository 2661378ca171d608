"""The images of a store as one listing showed them, and who names each: in some 200 bytes an image."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from prefect_ttapi.images.headers import EXTENSIONS
from prefect_ttapi.storage.layout import image_in, image_key, ledger_key
from prefect_ttapi.storage.objects import Listed

_TYPES: Final = tuple(EXTENSIONS)
_EXTENSIONS: Final = tuple(EXTENSIONS.values())
#: A ledger folder's number, from 1, in two bytes, and a request hash.
_NOBODY: Final = bytes(34)


class Images:
    """Sizes, ages and owners by key. Written in one thread, read in any.

    An owner is the place of a document in the ledger: its folder and its request hash.

    >>> images = Images()
    >>> images.add(Listed("images/" + "a" * 64 + ".png", 9, "tag", 0.0))
    True
    >>> images.name("images/" + "a" * 64 + ".png", ("sandbox", "b" * 64))
    >>> images.owners("images/" + "a" * 64 + ".png"), list(images.unnamed())
    (['ledger/sandbox/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb.json'], [])
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self._places: dict[bytes, int] = {}
        self._sizes = array("Q")
        self._modified = array("d")
        self._named = bytearray()
        self._first_owners = bytearray()
        self._other_owners: dict[int, list[bytes]] = {}
        self._folders: list[str] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, listed: Listed) -> bool:
        """Keep an image of a listing; False where the key is none of an image."""
        packed = _packed(listed.key)
        if packed is None:
            return False
        self._places[packed] = len(self._sizes)
        self._sizes.append(listed.size)
        self._modified.append(listed.modified)
        self._named.append(False)
        self._first_owners += _NOBODY
        self.total_bytes += listed.size
        return True

    def size(self, key: str) -> int | None:
        """Length in bytes, or None where the image was not listed."""
        place = self._place(key)
        return None if place is None else self._sizes[place]

    def modified(self, key: str) -> float:
        """When a listed image was written, Unix seconds."""
        return self._modified[self._places[_packed(key) or b""]]

    def name(self, key: str, owner: tuple[str, str] | None = None) -> None:
        """Note that something names the image: the ledger's document `owner`, or else a manifest."""
        place = self._place(key)
        if place is None:
            return
        self._named[place] = True
        if owner is None:
            return
        packed = self._packed_owner(*owner)
        start = place * len(_NOBODY)
        if self._first_owners[start : start + len(_NOBODY)] == _NOBODY:
            self._first_owners[start : start + len(_NOBODY)] = packed
        else:
            self._other_owners.setdefault(place, []).append(packed)

    def owners(self, key: str) -> list[str]:
        """Keys of the ledger's documents that name the image."""
        place = self._place(key)
        if place is None:
            return []
        start = place * len(_NOBODY)
        first = bytes(self._first_owners[start : start + len(_NOBODY)])
        owners = [first, *self._other_owners.get(place, ())]
        return [self._key_of(owner) for owner in owners if owner != _NOBODY]

    def keys(self) -> Iterator[str]:
        """All of them, in the listing's order."""
        return map(_unpacked, self._places)

    def unnamed(self) -> Iterator[str]:
        """Those that nothing names."""
        return (_unpacked(packed) for packed, place in self._places.items() if not self._named[place])

    def _place(self, key: str) -> int | None:
        packed = _packed(key)
        return None if packed is None else self._places.get(packed)

    def _packed_owner(self, folder: str, request_hash: str) -> bytes:
        if folder not in self._folders:
            self._folders.append(folder)
        return (self._folders.index(folder) + 1).to_bytes(2) + bytes.fromhex(request_hash)

    def _key_of(self, owner: bytes) -> str:
        return ledger_key(self._folders[int.from_bytes(owner[:2]) - 1], owner[2:].hex())


def _packed(key: str) -> bytes | None:
    found = image_in(key)
    if found is None or found[1] not in _EXTENSIONS:
        return None
    return bytes.fromhex(found[0]) + bytes([_EXTENSIONS.index(found[1])])


def _unpacked(packed: bytes) -> str:
    return image_key(packed[:-1].hex(), _TYPES[packed[-1]])
