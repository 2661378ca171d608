"""What a sandbox counts, so that a test can tell what was really called."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_REQUESTS_KEPT: Final = 1000


class Counters:
    """Counts since the start or the last reset; safe to read from other threads.

    Attributes:
        calls: generation requests that reached the endpoint, whatever became of them.
        paid: calls whose images were made, whether or not their answer arrived.
        images: made by those.
        in_flight, most_in_flight: calls that have arrived and are not yet answered; at once, at most.
        requests: the latest bodies that were JSON objects, at most 1000.
        calls_by_request, paid_by_request: by `ImageRequest.request_hash` of the body; legal ones with a key.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.in_flight = 0
        self.reset()

    def reset(self) -> None:
        """Start from zero; what is in flight stays in flight."""
        with self._lock:
            self.calls = self.paid = self.images = 0
            self.most_in_flight = self.in_flight
            self.requests: deque[dict[str, Any]] = deque(maxlen=_REQUESTS_KEPT)
            self.calls_by_request: Counter[str] = Counter()
            self.paid_by_request: Counter[str] = Counter()

    @contextmanager
    def arrived(self) -> Iterator[int]:
        """Count a call, and as in flight while the context is open; gives its number."""
        with self._lock:
            self.calls += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            number = self.calls
        try:
            yield number
        finally:
            with self._lock:
                self.in_flight -= 1

    def count_request(self, request_hash: str) -> int:
        """Count a legal request; gives how often it arrived, this time included."""
        with self._lock:
            self.calls_by_request[request_hash] += 1
            return self.calls_by_request[request_hash]

    def count_paid(self, request_hash: str, images: int) -> None:
        """Count a call whose images were made."""
        with self._lock:
            self.paid += 1
            self.images += images
            self.paid_by_request[request_hash] += 1

    def as_json(self) -> dict[str, Any]:
        """All numbers, of one moment; bodies are left out."""
        with self._lock:
            return {
                name: dict(value) if isinstance(value, Counter) else value
                for name, value in vars(self).items()
                if isinstance(value, int | Counter)
            }
