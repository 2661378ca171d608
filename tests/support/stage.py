"""A stage for the ledger: actors that halt before each step at the store, and a store that does as it is told.

Only one actor moves at a time, so that whoever directs them chooses every interleaving, fault and death.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from prefect_ttapi.errors import StoreError
from prefect_ttapi.results import StoredImage
from prefect_ttapi.storage.objects import ConflictError, NoAnswerError
from prefect_ttapi.storage.store import ImageStore

#: What may become of a write: is it done, and what does the writer hear?
WRITES: dict[str, tuple[bool, type[Exception] | None]] = {
    "works": (True, None),
    "answer lost": (True, NoAnswerError),
    "met itself": (True, ConflictError),  # sent twice on the way
    "lost": (False, NoAnswerError),
    "late": (False, NoAnswerError),  # comes to the store when nobody expects it any more, or never
    "busy": (False, ConflictError),  # refused for no fault of the writer's
    "fails": (False, StoreError),
}

#: How many answers a lane loses at most: after each, the ledger pauses before it goes on.
LOST_ANSWERS = 2


class DeathError(BaseException):
    """The process is no more: whatever it still tries has no effect."""


class Lane(threading.Thread):
    """A thread of an actor's. `at` names the step that it halts before; None: it has ended."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._orders: SimpleQueue[str] = SimpleQueue()
        self._halts: SimpleQueue[str | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._lost_answers = 0
        self.at: str | None = None

    def begin(self) -> Lane:
        """Run to the first halt."""
        self.start()
        self._come_to_a_halt()
        return self

    def proceed(self, order: str = "works") -> None:
        """Take the step as ordered and run to the next halt; raises what the thread raised."""
        if self.at == "write" and WRITES.get(order, (True, None))[1] in (NoAnswerError, ConflictError):
            self._lost_answers += 1
            order = order if self._lost_answers <= LOST_ANSWERS else "works"
        self._orders.put(order)
        self._come_to_a_halt()

    def die(self) -> None:
        """End without another step, whatever the thread still tries."""
        while self.at is not None:
            self.proceed("dies")

    def halt(self, step: str) -> str:
        """In the thread itself: wait for what is to become of the next step."""
        self._halts.put(step)
        order = self._orders.get()
        if order == "dies":
            raise DeathError
        return order

    def run(self) -> None:
        try:
            self._work()
        except DeathError:
            pass
        except BaseException as error:
            self._error = error
        self._halts.put(None)

    def _come_to_a_halt(self) -> None:
        self.at = self._halts.get()
        if self.at is None:
            self.join()
            if self._error is not None:
                raise self._error


def halt(step: str) -> str:
    """A lane halts here; anybody else goes on."""
    here = threading.current_thread()
    return here.halt(step) if isinstance(here, Lane) else "works"


class StagedStore:
    """A store at which lanes halt before each step.

    `written` is told of every write that is done: whose it is, the document before, if any, and the one after.
    """

    def __init__(
        self, store: ImageStore, written: Callable[[threading.Thread, bytes | None, bytes], None]
    ) -> None:
        self._store = store
        self._written = written
        self.late: list[tuple[threading.Thread, str, bytes, str | None]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def read_document(self, key: str) -> tuple[bytes, str] | None:
        _may_fail("read")
        return self._store.read_document(key)

    def missing(self, images: Sequence[StoredImage]) -> list[StoredImage]:
        _may_fail("look")
        return self._store.missing(images)

    def put_image(self, *arguments: object) -> StoredImage:
        _may_fail("put")
        return self._store.put_image(*arguments)

    def compare_and_swap(self, key: str, data: bytes, tag: str | None) -> str:
        fate = halt("write")
        done, error = WRITES[fate]
        write = (threading.current_thread(), key, data, tag)
        if fate == "late":
            self.late.append(write)
        new_tag = self._swap(*write) if done else ""
        halt("hear")  # meanwhile others see what was written
        if error is not None:
            raise error(fate)
        return new_tag

    def bring_a_late_write(self) -> None:
        """A write that its writer gave up, or sent again, is done after all if its condition holds."""
        if self.late:
            with suppress(ConflictError):
                self._swap(*self.late.pop(0))

    def _swap(self, writer: threading.Thread, key: str, data: bytes, tag: str | None) -> str:
        before = self._store.read_document(key)
        new_tag = self._store.compare_and_swap(key, data, tag)
        self._written(writer, before and before[0], data)
        return new_tag


def _may_fail(step: str) -> None:
    if halt(step) == "fails":
        raise StoreError(f"the credentials expired: no {step}")
