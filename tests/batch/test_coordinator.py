"""What the coordinator makes of its shards' ends: no Prefect run is needed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from prefect_ttapi.batch.breaker import Breaker
from prefect_ttapi.batch.coordinator import Coordinator, _Told
from prefect_ttapi.batch.items import Done, Item, row_of
from prefect_ttapi.batch.session import Session
from prefect_ttapi.batch.shape import Shape
from prefect_ttapi.batch.shards import Plan
from prefect_ttapi.generation.budget import Budget, Spending
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.layout import stop_key
from prefect_ttapi.storage.store import ImageStore

ITEM = Item(0, ImageRequest(prompt="tree", model="gpt-image-1"))


class Broken:
    """The future of a task run that Prefect suspended, or that was interrupted in its process."""

    def result(self, **_: object) -> None:
        raise KeyboardInterrupt


class Lost(Broken):
    """The future of a task run whose process died."""

    def result(self, **_: object) -> None:
        raise RuntimeError("died")


class Batch:
    """A coordinator with one request submitted, and what it hands on."""

    def __init__(self, store: ImageStore, *, local: bool) -> None:
        plan = Plan("batch", "run", "campaign", datetime.now(UTC))
        shape = Shape.of(1, 1, 1, local=local)
        self.coordinator = Coordinator(None, store, Ledger(store, "sandbox", "run"), plan, shape)
        self.coordinator._on_done = self._came
        self.coordinator._open[0] = ITEM
        self.coordinator._followers[ITEM.request.request_hash] = []
        self.coordinator._shards[self.future] = [ITEM]
        self.coordinator._shares[self.future] = Budget()
        self.session = Session(1, Spending(None), breaker=Breaker(3), on_done=self.coordinator.returned)
        self.statuses: list[str] = []

    future = Broken()

    def _came(self, done: Done) -> None:
        self.statuses.append(done.row.status)


@pytest.fixture
def batch(store: ImageStore, request: pytest.FixtureRequest) -> Iterator[Batch]:
    made = Batch(store, local=request.param)
    yield made
    made.session.close()


@pytest.mark.parametrize("batch", [True], indirect=True)
def test_what_ended_before_the_batch_was_left_keeps_its_outcome(batch: Batch):
    """An outcome that waits behind the word to leave is the row's: it was paid for, and is not called unsent."""
    coordinator, session = batch.coordinator, batch.session
    session.stop.cancel()
    coordinator._events.put(_Told.LEAVE)
    generated = Done(row_of(ITEM, "sandbox").model_copy(update={"status": "generated"}))
    session.run([ITEM], lambda *_: generated)
    coordinator._settle(coordinator._events.get(), session)
    assert batch.statuses == ["generated"]


@pytest.mark.parametrize("batch", [False], indirect=True)
def test_who_leaves_at_once_leaves_a_note(batch: Batch, store: ImageStore):
    """Shards elsewhere hear of a stop that came together with the word to leave."""
    batch.session.stop.cancel()
    batch.coordinator._settle(_Told.LEAVE, batch.session)
    assert store.read(stop_key("batch")) == b"CancelledError\nnot sent, because the batch was cancelled"
    assert batch.statuses == ["failed"]


@pytest.mark.parametrize(("batch", "status"), [(True, "skipped"), (False, "failed")], indirect=["batch"])
def test_a_task_run_that_is_suspended_is_waited_for_no_longer(batch: Batch, status: str):
    """Its rows are told, and nothing more is sent."""
    batch.coordinator._settle(batch.future, batch.session)
    assert (batch.statuses, batch.coordinator._shards) == ([status], {})
    assert batch.session.stop.error_type == "KeyboardInterrupt"


@pytest.mark.parametrize("batch", [False], indirect=True)
def test_a_task_run_that_breaks_down_is_one_failure(batch: Batch):
    """All its requests fail, which is no run of failures that the batch should be given up for."""
    coordinator, lost = batch.coordinator, Lost()
    items = [Item(row, ImageRequest(prompt=f"tree {row}", model="gpt-image-1")) for row in range(1, 6)]
    coordinator._open.update({item.row: item for item in items})
    coordinator._followers.update({item.request.request_hash: [] for item in items})
    coordinator._shards[lost], coordinator._shares[lost] = items, Budget()
    coordinator._settle(lost, batch.session)
    assert batch.statuses == ["failed"] * 5
    assert batch.session.stop.reason is None
