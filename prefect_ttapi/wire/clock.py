"""Time and chance, which tests bring themselves."""

from __future__ import annotations

import random
import time
from typing import Final

from prefect_ttapi.stopping import Stop

#: Seconds between two looks at whether a wait is still wanted.
POLL: Final = 0.5


class Clock:
    """Time and chance of this machine."""

    def monotonic(self) -> float:
        """Return seconds that only grow."""
        return time.monotonic()

    def now(self) -> float:
        """Return the time as Unix seconds."""
        return time.time()

    def sleep(self, seconds: float, stop: Stop) -> None:
        """Wait so long.

        Raises:
            StopSending: `stop` was set meanwhile, at most `POLL` seconds ago.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            stop.wait(min(POLL, left))
            stop.check()

    def jitter(self, most: float) -> float:
        """Return a random number from 0 to `most`."""
        return random.uniform(0, most)  # noqa: S311 - no secret
