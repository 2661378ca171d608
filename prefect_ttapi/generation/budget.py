"""What a batch may spend."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, NamedTuple, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from prefect_ttapi.capabilities import Model, Strict, problem
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import Usage

#: Models whose answers have no `usage`.
_WITHOUT_USAGE: Final = frozenset({"dall-e-2", "dall-e-3"})


class _Numbers(Strict):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth(cls, given: Any) -> Any:
        if isinstance(given, bool):
            raise problem("not_a_number", "is no number")
        return given


class Price(_Numbers):
    """What one model costs, in USD, as you know it from the vendor's price list; this package invents none.

    Attributes:
        per_image: for each image.
        per_million_input_tokens: for a million tokens of prompts.
        per_million_output_tokens: for a million tokens of images.
    """

    per_image: float = Field(default=0.0, ge=0)
    per_million_input_tokens: float = Field(default=0.0, ge=0)
    per_million_output_tokens: float = Field(default=0.0, ge=0)

    def of(self, images: int, usage: Usage | None) -> float:
        """Return the USD for one answer.

        >>> Price(per_image=0.1).of(3, None)
        0.3
        """
        return float(self.exactly(images, usage or Usage()))

    def exactly(self, images: int, usage: Usage) -> Decimal:
        """Return the USD for one answer, or for many, to the last digit: sums of floats drift."""
        per_image, per_input, per_output = (Decimal(str(value)) for _, value in self)
        million = per_input * usage.input_tokens + per_output * usage.output_tokens
        return per_image * images + million / 1_000_000


_FREE: Final = Price()


class Budget(_Numbers):
    """Limits of one batch; None is no limit.

    Before a request is sent, its cost is reserved: images, and USD with a price per image, exactly; tokens, and USD
    with prices by tokens, by the most expensive image of the same model, size and quality so far. The first request of
    such a kind is sent if anything is left, and nothing is sent after it until its answer is there. A limit can be
    exceeded only by what the requests under way cost above the most expensive one before them: see the page "Budgets".

    Requests keep their order. One that does not fit waits for those under way, which may turn out cheaper, and is
    skipped when none is left; then the next ones are tried. Images that are in the store already cost nothing. What may
    have been paid for counts as paid. Each retry of the flow run begins with the whole budget.

    Attributes:
        images: images to pay for at most.
        tokens: tokens to pay for at most, of prompts and images together.
        usd: US dollars to pay at most, by `prices`.
        prices: what each model costs.

    Raises:
        pydantic.ValidationError: a limit is no number or negative, or `usd` comes without `prices`.
    """

    images: int | None = Field(default=None, ge=0)
    tokens: int | None = Field(default=None, ge=0)
    usd: float | None = Field(default=None, ge=0)
    prices: Mapping[Model, Price] | None = None

    @model_validator(mode="after")
    def _usd_needs_prices(self) -> Self:
        if self.usd is not None and not self.prices:
            raise ValueError("usd needs prices, e.g. prices={'gpt-image-2': Price(per_image=0.05)}")
        return self

    def price(self, model: Model) -> Price:
        """Return what a model costs: nothing, where no price is given."""
        return (self.prices or {}).get(model, _FREE)

    def problem(self, request: ImageRequest) -> str | None:
        """Return why a limit can't be held for this request, or None."""
        tells_no_tokens = request.model in _WITHOUT_USAGE
        if self.tokens is not None and tells_no_tokens:
            return f"a budget in tokens can't be held: {request.model} tells none; limit images or usd"
        if self.usd is None:
            return None
        if request.model not in (self.prices or {}):
            return f"a budget in USD needs a price for {request.model}"
        if tells_no_tokens and not self.price(request.model).per_image:
            return f"a budget in USD needs a price per_image for {request.model}, which tells no tokens"
        return None

    def counts_tokens(self, model: Model) -> bool:
        """Return whether only an answer tells how much of a limit an image of this model takes."""
        price = self.price(model)
        by_tokens = bool(price.per_million_input_tokens or price.per_million_output_tokens)
        return self.tokens is not None or (self.usd is not None and by_tokens)


class Kind(NamedTuple):
    """Images that cost about the same."""

    model: Model
    size: str
    quality: str

    @classmethod
    def of(cls, request: ImageRequest) -> Self:
        """Return the kind of a request's images."""
        return cls(request.model, request.size, request.quality)

    def __str__(self) -> str:
        return f"{self.model} {self.size} {self.quality}"


@dataclass(frozen=True)
class Spent:
    """Images, tokens and USD."""

    images: int = 0
    tokens: int = 0
    usd: Decimal = Decimal()

    def __add__(self, more: Spent) -> Spent:
        return Spent(self.images + more.images, self.tokens + more.tokens, self.usd + more.usd)


#: What is limited, and how its amounts are written.
_UNITS: Final = {"images": "images", "tokens": "tokens", "usd": "USD"}
_AMOUNTS: Final = {"images": ",", "tokens": ",", "usd": ",.4f"}


class Denial(NamedTuple):
    """Why a request can't be sent; `final` where nothing is under way that may leave room for it."""

    why: str
    final: bool


class Spending:
    """What a batch has spent and reserved, against its budget; for all threads of a process.

    What is reserved is counted in images, by kind, and its cost made of that when somebody asks: an image that is
    dearer than those before it raises what is reserved for all of its kind.
    """

    def __init__(self, budget: Budget | None) -> None:
        self.budget = budget or Budget()
        given = {name: getattr(self.budget, name) for name in _UNITS}
        self._limits = {name: Decimal(str(limit)) for name, limit in given.items() if limit is not None}
        self._told = Spent()
        self._untold: Counter[Kind] = Counter()  # images that are perhaps paid for, of unknown cost
        self._uncounted = 0  # images that came without the tokens that a limit needs
        self._reserved: Counter[Kind] = Counter()
        self._dearest: dict[Kind, Usage] = {}  # what an image took at most
        self._surprise = "what was under way when it was reached"
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # a share goes along with its lane
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    @property
    def spent(self) -> Spent:
        """What was paid for, with an estimate of what perhaps was."""
        with self._lock:
            return self._told + self._cost(self._untold)

    @property
    def reserved(self) -> int:
        """Images that may be asked for, and are not settled yet."""
        return self._reserved.total()

    def reserve(self, request: ImageRequest) -> Denial | None:
        """Set aside what a request will cost before it is sent; return why it may not be."""
        with self._lock:
            if (denial := self.denial(request)) is None:
                self._reserved[Kind.of(request)] += request.n
            return denial

    def denial(self, request: ImageRequest) -> Denial | None:
        """Return why a request could not be reserved now, or None."""
        with self._lock:
            reserved = +self._reserved
            before = self.spent + self._cost(reserved)
            more = self._cost({Kind.of(request): request.n})
            first = next((kind for kind in reserved if not self._is_known(kind)), None)
        for name, limit in self._limits.items():
            so_far, wanted, form = getattr(before, name), getattr(more, name), _AMOUNTS[name]
            if so_far >= limit or so_far + wanted > limit:
                why = f"{wanted:{form}} more would pass the limit of {self._limit(name)}"
                return Denial(f"{why}: {so_far:{form}} are spent or under way", final=not reserved)
        why = f"the first of {first} is under way: nobody knows its cost yet"
        return Denial(why, final=False) if first else None

    def passed(self) -> str | None:
        """Return which limit is reached, or would be passed by what is reserved: answers were dearer than expected."""
        with self._lock:
            spent = self.spent
            then = spent + self._cost(+self._reserved)
        for name, limit in self._limits.items():
            if getattr(spent, name) >= limit or getattr(then, name) > limit:
                return f"{getattr(spent, name):{_AMOUNTS[name]}} of {self._limit(name)} are spent"
        return None

    def settle(self, request: ImageRequest, images: int, usage: Usage | None) -> None:
        """Turn the reservation of a request that came back into the `images` that were paid for, perhaps none.

        Args:
            usage: of the answer; None where there is none, and the images may have been paid for.
        """
        with self._lock:
            self._reserved[Kind.of(request)] -= request.n
            self.count(request, images, usage)

    def count(self, request: ImageRequest, images: int, usage: Usage | None) -> None:
        """Count what turns out to be paid for after its reservation was given back; the arguments are `settle`'s."""
        if not images:
            return
        kind = Kind.of(request)
        with self._lock:
            raised = self._learn(kind, images, usage) if usage is not None else ""
            if usage is None or (self.budget.counts_tokens(kind.model) and not _tokens(usage)):
                self._untold[kind] += images
                self._uncounted += images if usage is not None else 0
            else:
                usd = self.budget.price(kind.model).exactly(images, usage)
                self._told += Spent(images, _tokens(usage), usd)
            if raised and self.passed():
                self._surprise = raised

    def learn(self, request: ImageRequest, images: int, usage: Usage | None) -> None:
        """Take what images cost that were paid for before."""
        if images and usage is not None and _tokens(usage):
            with self._lock:
                self._learn(Kind.of(request), images, usage)

    def share(self, requests: Iterable[ImageRequest]) -> Spending:
        """Return what may be spent by a lane that can't see what others spend: what is reserved for its requests.

        Where one of these is the first of its kind, that is all that is left.
        """
        part = Spending(Budget(prices=self.budget.prices))
        for request in requests:
            part._reserved[Kind.of(request)] += request.n
        with self._lock:
            part._dearest = dict(self._dearest)
            cost = self._cost(part._reserved)
            rest = self.spent + self._cost(self._reserved - part._reserved)
            is_known = all(map(self._is_known, part._reserved))
        for name in self._limits.keys() - {"images"}:  # these are reserved, and each is asked for once
            left = max(Decimal(), self._limits[name] - getattr(rest, name))
            limit = Decimal(getattr(cost, name)) if is_known else left
            if limit or not is_known:
                part._limits[name] = limit
        return part

    def notes(self) -> tuple[str, ...]:
        """Return a line for each limit that was passed, and why."""
        spent = self.spent
        over = {name: getattr(spent, name) - limit for name, limit in self._limits.items()}
        lines = [
            f"{amount:{_AMOUNTS[name]}} over the limit of {self._limit(name)}: {self._surprise}"
            for name, amount in over.items()
            if amount > 0
        ]
        if self._uncounted:
            lines.append(f"images without a count of tokens: {self._uncounted:,}; their cost is an estimate")
        return tuple(lines)

    def _limit(self, name: str) -> str:
        return f"{self._limits[name]:{_AMOUNTS[name]}} {_UNITS[name]}"

    def _cost(self, images: Mapping[Kind, int]) -> Spent:
        """Return what so many images of each kind cost, if none is dearer than the dearest so far."""
        total = Spent()
        for kind, count in images.items():
            one = self._dearest.get(kind) or Usage()
            usd = self.budget.price(kind.model).exactly(1, one)
            total += Spent(count, count * one.total_tokens, count * usd)
        return total

    def _is_known(self, kind: Kind) -> bool:
        return kind in self._dearest or not self.budget.counts_tokens(kind.model)

    def _learn(self, kind: Kind, images: int, usage: Usage) -> str:
        """Note what each of these images took; return how that is more than was known, if it is."""
        before = self._dearest.get(kind) or Usage()
        took = {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "total_tokens": _tokens(usage),
        }
        each = {name: max(getattr(before, name), -(-count // images)) for name, count in took.items()}
        self._dearest[kind] = now = Usage(**each)
        if now.total_tokens <= before.total_tokens:
            return ""
        known = f"the dearest before it {before.total_tokens:,}" if before.total_tokens else "the first"
        return f"one of {kind} took {now.total_tokens:,} tokens, {known}"


def _tokens(usage: Usage) -> int:
    return max(usage.total_tokens, usage.input_tokens + usage.output_tokens)
