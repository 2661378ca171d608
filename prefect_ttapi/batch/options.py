"""The options of a batch, as `generate_batch`, `check_batch`, `estimate_batch` and the command line share them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from prefect_ttapi.errors import IllegalBatchError
from prefect_ttapi.generation.budget import Budget
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.generation.provenance import Provenance
from prefect_ttapi.generation.runs import GRACE
from prefect_ttapi.images.renditions import Rendition, Version, versions_of
from prefect_ttapi.lineage.shown import Shown
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.store import ImageStore


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a batch is generated and delivered; `generate_batch` says what each option means.

    >>> BatchOptions(max_in_flight=0, rate_limit=-1.0).check()
    Traceback (most recent call last):
        ...
    prefect_ttapi.errors.IllegalBatchError: nothing was sent: 2 problem(s) in the batch
      max_in_flight must be a whole number of at least 1, not 0
      rate_limit must be a number of requests per minute above 0, not -1.0
    """

    deliver_to: ImageStore | None = None
    key: str = DEFAULT_KEY
    max_in_flight: int = 8
    shard_size: int | None = None
    budget: Budget | None = None
    name: str = "batch"
    refresh_cache: bool | None = None
    cache_expiration: timedelta | None = None
    breaker: int | None = 10
    max_refused: int | None = 50
    rate_limit: float | None = None
    grace: float = GRACE
    thumbnails: bool = True
    renditions: Sequence[Rendition | Mapping[str, Any]] = ()
    keep_original: bool = True
    overwrite: bool = False
    provenance: Provenance | Mapping[str, Any] | None = None
    record_prompts: bool = True

    @cached_property
    def versions(self) -> tuple[Version, ...]:
        """What is delivered of each image. ValueError: the renditions are illegal."""
        return versions_of(self.renditions, keep_original=self.keep_original)

    @cached_property
    def marking(self) -> Provenance | None:
        """What delivered files get. ValueError: it is illegal."""
        return None if self.provenance is None else Provenance.model_validate(self.provenance)

    @property
    def shown(self) -> Shown:
        """What may be shown of prompts."""
        return Shown(self.record_prompts)

    def delivery(
        self, date: datetime, run_id: str | None = None, source: ImageStore | None = None
    ) -> Delivery | None:
        """Return where and how images are delivered; None where they are not."""
        if self.deliver_to is None:
            return None
        return Delivery(
            self.deliver_to,
            self.key,
            batch=self.name,
            date=date,
            source=source,
            versions=self.versions,
            overwrite=self.overwrite,
            run_id=run_id,
            provenance=self.marking,
        )

    def check(self) -> None:
        """Raise IllegalBatchError where an option makes no sense, with a line for each."""
        at_least_one = {
            "max_in_flight": self.max_in_flight,
            "shard_size": self.shard_size,
            "breaker": self.breaker,
            "max_refused": self.max_refused,
        }
        problems = [
            f"{option} must be a whole number of at least 1, not {value!r}"
            for option, value in at_least_one.items()
            if (type(value) is not int or value < 1) and (value is not None or option == "max_in_flight")
        ]
        if self.rate_limit is not None and not 0 < self.rate_limit < math.inf:
            problems.append(
                f"rate_limit must be a number of requests per minute above 0, not {self.rate_limit}"
            )
        for argument, kind in ((self.deliver_to, ImageStore), (self.budget, Budget)):
            if argument is not None and not isinstance(argument, kind):
                problems.append(f"{kind.__name__} is needed, not {type(argument).__name__}")
        try:
            _ = self.versions
        except ValueError as error:
            problems.append(f"renditions: {error}")
        try:
            _ = self.marking
        except ValueError as error:
            problems.append(f"provenance: {error}")
        if problems:
            raise IllegalBatchError(problems)
