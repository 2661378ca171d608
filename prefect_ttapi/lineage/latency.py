"""How long answers took, in a histogram that adds up and never grows: a bucket is 6 % wider than the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

#: Percent of the answers.
PERCENTILES: Final = (50, 90, 99)

_SHORTEST: Final = 0.001  # seconds
_WIDER: Final = 1.06
_BUCKETS: Final = 320  # more than a day


def bucket(seconds: float) -> int:
    """Which bucket holds this many seconds.

    >>> bucket(0.0), bucket(1.0), bucket(60.0), bucket(1e9)
    (0, 119, 189, 320)
    """
    if seconds <= _SHORTEST:
        return 0
    return min(math.ceil(math.log(seconds / _SHORTEST, _WIDER)), _BUCKETS)


def percentile(counts: Mapping[int, int], share: float) -> float:
    """Seconds that `share` percent of the answers took at most, 3 % off at the worst, in three digits.

    Args:
        counts: answers by bucket; there must be some.

    >>> percentile({bucket(2.0): 98, bucket(40.0): 2}, 50), percentile({bucket(2.0): 98, bucket(40.0): 2}, 99)
    (2.01, 39.2)
    """
    rank = math.ceil(sum(counts.values()) * share / 100)
    for number in sorted(counts):
        rank -= counts[number]
        if rank <= 0:
            break
    return float(f"{_SHORTEST * _WIDER ** (number - 0.5):.3g}")
