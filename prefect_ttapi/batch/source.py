"""What a batch is given to do, read in a thread of its own: a source that is slow, or hangs, holds up nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass
from typing import Final

from prefect_ttapi.batch.items import Done, Item

#: How many items may be at hand that nobody has taken yet.
_AHEAD: Final = 16


@dataclass(frozen=True)
class Came:
    """The source gave one more."""

    item: Item | Done


@dataclass(frozen=True)
class Ended:
    """The source gives no more, perhaps because it broke."""

    error: BaseException | None = None


class Source:
    """Reads items a few ahead.

    Args:
        items: read in a thread with the context of `start`.
        tell: is given each item, and the end.
        unwanted: asked before each; once it is true nothing more is read.
    """

    def __init__(
        self,
        items: Iterator[Item | Done],
        tell: Callable[[Came | Ended], None],
        unwanted: Callable[[], bool],
    ) -> None:
        self._items = items
        self._tell = tell
        self._unwanted = unwanted
        self._room = threading.Semaphore(_AHEAD)

    def start(self) -> None:
        """Begin to read."""
        context = copy_context()
        threading.Thread(target=context.run, args=(self._read,), name="ttapi-source", daemon=True).start()

    def taken(self) -> None:
        """One of the items told is taken: there is room for another one."""
        self._room.release()

    def _read(self) -> None:
        try:
            while self._room.acquire() and not self._unwanted():
                self._tell(Came(next(self._items)))
        except StopIteration:
            self._tell(Ended())
        except BaseException as error:
            self._tell(Ended(error))
        else:
            self._tell(Ended())
