"""Engines outside Prefect, and limits in which a test may look or meddle."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.generation.engine import Engine
from prefect_ttapi.generation.limits import Limits, Place
from prefect_ttapi.generation.runs import RunContext
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import GeneratedImages
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.store import ImageStore


def run_of(name: str = "run", **facts: Any) -> RunContext:
    """A run of this name, for whoever pays and files."""
    now = datetime.now(UTC)
    known = {
        "run_id": name,
        "flow_run_id": None,
        "task_run_id": None,
        "flow_name": "images",
        "place": name,
        "attempt": (1,),
        "date": now,
        "started": now,
    }
    return RunContext(**{**known, **facts})


def engine_of(store: ImageStore, client: TTAPIClient, payer: str | Ledger = "run", **options: Any) -> Engine:
    """An engine whose run has this name, or that has this ledger."""
    ledger = payer if isinstance(payer, Ledger) else Ledger(store, client.api_origin, payer)
    return Engine(client, store, ledger, **{"run": run_of(), **options})


class WatchedLimits(Limits):
    """Limits that tell a test of each send, and of each answer before it is stored."""

    def __init__(
        self,
        before_send: Callable[[int], None] = lambda _: None,
        on_answer: Callable[[], None] = lambda: None,
        stop: Stop | None = None,
    ) -> None:
        super().__init__(stop)
        self._before_send = before_send
        self.on_answer = on_answer

    def admit(self, attempt: int) -> None:
        super().admit(attempt)
        self._before_send(attempt)

    def place(self, request: ImageRequest) -> Place:
        return _WatchedPlace(self, request)


class _WatchedPlace(Place):
    def answered(self, answer: GeneratedImages) -> None:
        super().answered(answer)
        self._limits.on_answer()
