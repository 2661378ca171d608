"""What earlier batches of the same name made: their manifests, as an index of the ledger.

A small document, `batches/latest/<name>.json`, names the last manifests of a batch's name. It is a hint and no more: a
row of theirs is trusted only where a listing shows that the ledger record it was made from still stands.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO, Final, Self

from prefect_ttapi.batch.thumbnail_zip import ThumbnailPack
from prefect_ttapi.errors import StoreError
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.storage.layout import BATCHES, MANIFEST, THUMBNAILS, latest_key
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: How many manifests a name's document keeps: a run that was cut short, or had a part of the requests, hides nothing.
KEPT: Final = 3

#: In a manifest's line the request's hash stands before anything that a prompt could imitate.
_HASH: Final = re.compile(rb'^\{"row":\d+,"status":"[a-z]+","request_hash":"([0-9a-f]{64})"')


def remember(store: ImageStore, name: str, api_origin: str, folder: str) -> None:
    """Note the folder of a batch that has ended; where that fails the next one has to look into the ledger."""
    key = latest_key(name, api_origin)
    try:
        folders = [folder, *(known for known in _folders(store, key) if known != folder)][:KEPT]
        document = json.dumps({"name": name, "api_origin": api_origin, "folders": folders}, indent=1)
        store.write(key, document.encode(), "application/json")
    except StoreError as error:
        logger.warning("What this batch made is not noted for the next one: %s", error)


def _folders(store: ImageStore, key: str) -> list[str]:
    try:
        folders = json.loads(store.read(key) or b"{}")["folders"]
        return [folder for folder in folders if isinstance(folder, str) and folder.startswith(BATCHES)]
    except (KeyError, TypeError, ValueError):
        return []


class Earlier:
    """The rows of earlier manifests that may stand for the requests of a batch; in memory is only where they are."""

    def __init__(
        self, store: ImageStore, name: str, api_origin: str, wanted: Collection[bytes], thumbnails: bool
    ) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}
        self._files: list[BinaryIO] = []
        self._packs: list[ThumbnailPack | None] = []
        self._close = ExitStack()
        try:
            folders = _folders(store, latest_key(name, api_origin))
        except StoreError:
            return
        for folder in folders:
            if len(self._places) < len(wanted):
                self._add(store, folder, wanted, thumbnails)

    def _add(self, store: ImageStore, folder: str, wanted: Collection[bytes], thumbnails: bool) -> None:
        try:
            manifest = self._close.enter_context(store.open(store.uri(f"{folder}/{MANIFEST}")))
        except StoreError:
            return  # deleted since
        start = 0
        for line in manifest:
            found = _HASH.match(line)
            request = bytes.fromhex(found[1].decode()) if found else b""
            if request in wanted and request not in self._places and b'"ledger_tag":"' in line:
                self._places[request] = len(self._files), start
            start += len(line)
        self._files.append(manifest)
        pack = ThumbnailPack.of(store, store.uri(f"{folder}/{THUMBNAILS}")) if thumbnails else None
        self._packs.append(pack)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()
        for pack in self._packs:
            if pack is not None:
                pack.close()

    def row(self, request_hash: str) -> Row | None:
        """What the last of these manifests says of a request."""
        place = self._places.get(bytes.fromhex(request_hash))
        if place is None:
            return None
        file = self._files[place[0]]
        file.seek(place[1])
        try:
            row = next(read_manifest([file.readline()]), None)
        except ValueError:
            return None
        return row if row and row.request_hash == request_hash else None

    def thumbnails(self, row: Row) -> tuple[bytes | None, ...]:
        """The pictures that the row's batch showed of its images; None where there is none."""
        place = self._places.get(bytes.fromhex(row.request_hash or ""))
        pack = self._packs[place[0]] if place else None
        return tuple(pack.get(image.sha256) if pack else None for image in row.images)
