"""What a batch may spend."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prefect_ttapi.capabilities import Model
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import Usage

#: Models whose answers have no `usage`.
_WITHOUT_USAGE: Final = frozenset({"dall-e-2", "dall-e-3"})


class Price(BaseModel):
    """What one model costs, in USD, as you know it from the vendor's price list; this package invents none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_image: float = Field(0.0, ge=0)
    per_million_input_tokens: float = Field(0.0, ge=0)
    per_million_output_tokens: float = Field(0.0, ge=0)

    def of(self, images: int, usage: Usage | None) -> float:
        """USD for one answer.

        >>> Price(per_image=0.02).of(3, None)
        0.06
        """
        tokens = (usage.input_tokens, usage.output_tokens) if usage else (0, 0)
        million = self.per_million_input_tokens * tokens[0] + self.per_million_output_tokens * tokens[1]
        return self.per_image * images + million / 1e6


class Budget(BaseModel):
    """Limits of one batch; None is no limit.

    `images` is a hard limit: images are reserved before a request is sent. Tokens and USD are known only afterwards:
    they stop the batch when the settled sum reaches them, so that what is in flight then can go over. Images that
    are already in the store cost nothing. Each retry of the flow run begins with the whole budget.

    Raises:
        pydantic.ValidationError: a limit is negative, or `usd` comes without `prices`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int | None = Field(None, ge=0)
    tokens: int | None = Field(None, ge=0)
    usd: float | None = Field(None, ge=0)
    prices: Mapping[Model, Price] | None = None

    @model_validator(mode="after")
    def _usd_needs_prices(self) -> Self:
        if self.usd is not None and not self.prices:
            raise ValueError("usd needs prices, e.g. prices={'gpt-image-2': Price(per_image=0.05)}")
        return self

    def problem(self, request: ImageRequest) -> str | None:
        """Why a limit can't be held for this request, or None."""
        tells_no_tokens = request.model in _WITHOUT_USAGE
        if self.tokens is not None and tells_no_tokens:
            return f"a budget in tokens can't be held: {request.model} tells none; limit images or usd"
        if self.usd is None:
            return None
        price = (self.prices or {}).get(request.model)
        if price is None:
            return f"a budget in USD needs a price for {request.model}"
        if tells_no_tokens and not price.per_image:
            return f"a budget in USD needs a price per_image for {request.model}, which tells no tokens"
        return None


class Spending:
    """What a batch has spent and reserved, against its budget; for all threads of a process."""

    def __init__(self, budget: Budget | None) -> None:
        self.budget = budget or Budget()
        self.images = 0
        self.reserved = 0
        self.tokens = 0
        self.usd = 0.0
        self._lock = threading.Lock()

    def denial(self, images: int) -> str | None:
        """Why `images` more may not be asked for, or None."""
        budget = self.budget
        with self._lock:  # else a reservation may be gone, and what became of it not counted yet
            if budget.images is not None and self.images + self.reserved + images > budget.images:
                return f"{images} more would pass the limit of {budget.images} images"
            if budget.tokens is not None and self.tokens >= budget.tokens:
                return f"{self.tokens:,} tokens were used, the limit is {budget.tokens:,}"
            if budget.usd is not None and self.usd >= budget.usd:
                return f"{self.usd:.2f} USD were spent, the limit is {budget.usd:.2f}"
        return None

    def reserve(self, images: int) -> None:
        """Set `images` aside before they are asked for."""
        with self._lock:
            self.reserved += images

    def settle(self, request: ImageRequest, images: int, usage: Usage | None) -> None:
        """Turn the reservation of a request that came back into the `images` that were paid for, perhaps none."""
        with self._lock:
            self.reserved -= request.n
            self.images += images
            if images:
                self.tokens += usage.total_tokens if usage else 0
                price = (self.budget.prices or {}).get(request.model)
                self.usd += price.of(images, usage) if price else 0.0

    def share(self, parts: int, promised: Iterable[Budget]) -> Budget:
        """Return what one of `parts` that can't see each other's spending may spend; images are reserved beforehand.

        Args:
            promised: the shares of others who have not told yet what they spent.
        """
        budget, others = self.budget, list(promised)
        tokens = (budget.tokens or 0) - self.tokens - sum(other.tokens or 0 for other in others)
        usd = (budget.usd or 0.0) - self.usd - sum(other.usd or 0.0 for other in others)
        return Budget(
            tokens=None if budget.tokens is None else max(1, tokens // parts),
            usd=None if budget.usd is None else max(0.000_001, usd / parts),
            prices=budget.prices,
        )

    def overshoot(self) -> tuple[str, ...]:
        """Return a line for each limit that was passed: what was under way when it was reached."""
        budget = self.budget
        passed = []
        if budget.tokens is not None and self.tokens > budget.tokens:
            passed.append(f"{self.tokens - budget.tokens:,} tokens over the limit of {budget.tokens:,}")
        if budget.usd is not None and self.usd > budget.usd:
            passed.append(f"{self.usd - budget.usd:.4f} USD over the limit of {budget.usd:.2f}")
        return tuple(f"{over}, by what was under way when it was reached" for over in passed)
