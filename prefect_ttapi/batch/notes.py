"""How shards in other processes hear that their batch has stopped: a note in the store, looked for now and then."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Final

from prefect_ttapi.batch.session import Stop
from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.layout import stop_key
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Seconds between looks.
_EVERY: Final = 2.0


def write_note(store: ImageStore, batch_id: str, reason: str, error_type: str | None) -> None:
    """Tell the batch's shards why they are to stop; where that fails they go on to their own end."""
    try:
        note = f"{error_type or ''}\n{reason}".encode(errors="replace")
        store.write(stop_key(batch_id), note, "text/plain; charset=utf-8")
    except StoreError as error:
        logger.warning("Task runs in other processes do not hear that the batch stops: %s", error)


def remove_note(store: ImageStore, batch_id: str) -> None:
    """Nobody is left to read it."""
    with suppress(StoreError):
        store.remove(stop_key(batch_id))


class NotedStop(Stop):
    """A `Stop` that another process may set by a note."""

    def __init__(self, store: ImageStore, batch_id: str) -> None:
        self._store = store
        self._key = stop_key(batch_id)
        self._next_look = 0.0
        self._reason: str | None = None
        super().__init__()

    @property
    def reason(self) -> str | None:
        """Why nothing more is sent; looks for the note where the last look was a while ago."""
        if self._reason is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _EVERY
            with suppress(StoreError):
                note = self._store.read(self._key)
                kind, _, reason = (note or b"").decode(errors="replace").partition("\n")
                if note:
                    self.error_type, self._reason = kind or None, reason
        return self._reason

    @reason.setter
    def reason(self, reason: str | None) -> None:
        self._reason = reason
