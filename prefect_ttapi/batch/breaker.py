"""When to give a batch up: many requests in a row that fail in the same way will not be the last ones."""

from __future__ import annotations

import threading

#: Failures that are about one prompt, and say nothing of the next one.
_OF_ONE_PROMPT = frozenset({"ModerationError"})


class Breaker:
    """Counts failures of one kind in a row; safe from all threads.

    Args:
        limit: this many trip it; None: never.

    Raises:
        ValueError: the limit is less than 1.

    >>> breaker = Breaker(limit=2)
    >>> breaker.note("ServerError"), breaker.note("ModerationError"), breaker.note("ServerError")
    (None, None, '2 requests in a row failed with ServerError')
    """

    def __init__(self, limit: int | None = 10) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"a breaker trips after at least 1 failure, not {limit}")
        self._limit = limit
        self._lock = threading.Lock()
        self._kind: str | None = None
        self._in_a_row = 0

    def note(self, error_type: str | None) -> str | None:
        """A request has ended, in order of completion; why the batch should be given up, once it should.

        Args:
            error_type: the name of the error's class; None: the request succeeded.
        """
        if error_type in _OF_ONE_PROMPT:
            return None
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if error_type == self._kind else 1
            self._kind = error_type
            if error_type is None or self._limit is None or self._in_a_row < self._limit:
                return None
            return f"{self._in_a_row} requests in a row failed with {error_type}"
