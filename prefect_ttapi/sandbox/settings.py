"""How a sandbox behaves, and what of that depends on the request: chance that repeats itself."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from prefect_ttapi.sandbox.failures import checked_name

Items = Literal["model", "b64", "url", "mixed"]
ITEMS: Final[tuple[str, ...]] = get_args(Items)


@dataclass(frozen=True)
class Settings:
    """How a sandbox behaves.

    Attributes:
        latency: seconds from the shortest to the longest that images take.
        fail: rates, 0 to 1, by the name of the failure; see `failures`.
        seed: another seed gives other pictures, latencies and failures.
        api_key: the only right key; None: any.
        items: `model`: DALL-E models by `response_format`, url by default, GPT Image models as base64, as the
            vendor says; `b64`, `url`: always; `mixed`: in turns within an answer, from base64.
        tiny: draw at most 64 pixels a side, whatever was asked: for measuring everything else.
        image_bytes: length of each finished PNG, filled up with noise; None: as it comes.
        room: calls that are worked on at once; further ones get 429. None: any number.
    """

    latency: tuple[float, float] = (0.0, 0.0)
    fail: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    api_key: str | None = None
    items: Items = "model"
    tiny: bool = False
    image_bytes: int | None = None
    room: int | None = None

    def __post_init__(self) -> None:
        shortest, longest = self.latency
        if not 0 <= shortest <= longest < float("inf"):
            raise ValueError(f"latency goes from a shorter to a longer time in seconds, not {self.latency}")
        for name, rate in self.fail.items():
            checked_name(name)
            if not 0 <= rate <= 1:
                raise ValueError(f"the rate of {name} goes from 0 to 1, not {rate}")
        if sum(self.fail.values()) > 1:
            raise ValueError("the rates of all failures add up to more than 1")
        if self.room is not None and self.room < 1:
            raise ValueError(f"there is room for at least 1 call, not {self.room}")
        if self.items not in ITEMS:
            raise ValueError(f"items is one of {', '.join(ITEMS)}, not {self.items!r}")


def latency_range(latency: float | str | tuple[float, float]) -> tuple[float, float]:
    """Seconds, shortest and longest.

    >>> latency_range(2), latency_range("0.5-1.5"), latency_range((1, 2))
    ((2.0, 2.0), (0.5, 1.5), (1.0, 2.0))

    Raises:
        ValueError: it is neither seconds nor a range of them.
    """
    try:
        if isinstance(latency, str):
            low, _, high = latency.partition("-")
            return float(low), float(high or low)
        if isinstance(latency, tuple):
            shortest, longest = latency
            return float(shortest), float(longest)
        return float(latency), float(latency)
    except (TypeError, ValueError):
        raise ValueError(f"latency is seconds, e.g. 2 or 0.5-1.5, not {latency!r}") from None


@dataclass(frozen=True)
class Fate:
    """What chance has for one call: seconds of work, and the name of a failure."""

    latency: float
    failure: str | None


def fate(settings: Settings, request_hash: str, call: int) -> Fate:
    """The same for the same seed, request and number of the call, in whatever order requests arrive.

    >>> settings = Settings(fail={"429": 0.5})
    >>> fate(settings, "f5a1", call=1).failure, fate(settings, "f5a1", call=2).failure
    ('429', None)
    """
    chance = random.Random(f"{settings.seed}/{request_hash}/{call}")  # noqa: S311 - no secret
    latency = chance.uniform(*settings.latency)
    point, passed = chance.random(), 0.0
    for name, rate in settings.fail.items():
        passed += rate
        if point < passed:
            return Fate(latency, name)
    return Fate(latency, None)
