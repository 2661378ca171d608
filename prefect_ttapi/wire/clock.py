"""Time and chance, which tests bring themselves."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Time and chance. Tests bring their own.

    Attributes:
        monotonic: seconds that only grow.
        now: Unix seconds.
        sleep: waits that many seconds; what it raises ends the request.
        jitter: a random number from 0 to its argument.
    """

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[float], float] = lambda most: random.uniform(0, most)  # noqa: S311 - no secret
