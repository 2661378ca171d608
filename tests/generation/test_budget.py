"""What a batch may spend: limits in images, tokens and USD, held before anything is sent."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefect_ttapi.generation.budget import Budget, Price, Spending
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import Usage

BY_IMAGE = {"gpt-image-1": Price(per_image=0.1)}
BY_TOKENS = {"gpt-image-1": Price(per_million_output_tokens=10)}


def request(n: int = 1, **fields: object) -> ImageRequest:
    return ImageRequest.model_validate({"prompt": "a tree", "model": "gpt-image-1", "n": n, **fields})


def usage(tokens: int) -> Usage:
    return Usage(output_tokens=tokens, total_tokens=tokens)


def test_a_price_per_image_is_reserved_exactly():
    """Three at 0.1 fit into 0.3, whatever floats make of that; a fourth does not, and no request is tried first."""
    spending = Spending(Budget(usd=0.3, prices=BY_IMAGE))
    assert [spending.reserve(request()) for _ in range(3)] == [None] * 3
    denial = spending.reserve(request())
    assert denial is not None
    assert not denial.final
    for _ in range(3):
        spending.settle(request(), 1, None)
    assert spending.spent.usd == Decimal("0.3")
    assert spending.notes() == ()
    denial = spending.reserve(request())
    assert denial == (
        "0.1000 more would pass the limit of 0.3000 USD: 0.3000 are spent or under way",
        True,
    )


def test_a_request_of_many_images_is_reserved_whole():
    """Four images at 0.1 do not fit into 0.3; three do."""
    spending = Spending(Budget(usd=0.3, prices=BY_IMAGE))
    assert spending.reserve(request(4)) is not None
    assert spending.reserve(request(3)) is None


@pytest.mark.parametrize(
    "budget", [Budget(tokens=1000), Budget(usd=0.01, prices=BY_TOKENS)], ids=["tokens", "usd"]
)
def test_the_first_of_a_kind_tells_what_its_kind_costs(budget: Budget):
    """It is sent when something is left, nothing goes beside it, and then each is reserved by the dearest so far."""
    spending = Spending(budget)
    assert spending.reserve(request()) is None
    for other in (request(), request(size="1536x1024")):
        assert spending.reserve(other) == (
            "the first of gpt-image-1 auto auto is under way: nobody knows its cost yet",
            False,
        )
    spending.settle(request(), 1, usage(300))
    assert [spending.reserve(request()) for _ in range(2)] == [None, None]
    assert spending.reserve(request()) is not None
    # another kind has a first of its own
    assert spending.reserve(request(size="1536x1024")) is None
    assert spending.reserve(request(quality="low")) is not None


def test_a_kind_is_known_whatever_number_of_images_told_it():
    """What four images took is a quarter for each, rounded up."""
    spending = Spending(Budget(tokens=1000))
    assert spending.reserve(request(4)) is None
    spending.settle(request(4), 4, usage(801))
    assert spending.reserve(request()) is not None
    assert spending.spent.tokens == 801


@pytest.mark.parametrize("images", [0, 2])
def test_what_is_not_paid_for_is_free_again(images: int):
    """What was refused costs nothing; what may have been paid for counts, by what such images cost."""
    spending = Spending(Budget(images=2, tokens=1000))
    spending.learn(request(), 1, usage(500))
    assert spending.reserve(request(2)) is None
    spending.settle(request(2), images, None)
    assert (spending.spent.images, spending.spent.tokens) == (images, images * 500)
    assert (spending.reserve(request(2)) is None) == (not images)


def test_what_perhaps_was_paid_for_counts_once_its_kind_is_known():
    """A first one whose outcome nobody knows costs nothing yet, and does not hold up the next."""
    spending = Spending(Budget(tokens=1000))
    assert spending.reserve(request()) is None
    spending.settle(request(), 1, None)
    assert spending.reserve(request()) is None
    spending.settle(request(), 1, usage(400))
    assert spending.spent.tokens == 800
    assert spending.reserve(request()) is not None


def test_a_surprise_is_named():
    """How much a limit was passed, and by what; later ones of the kind are reserved by it."""
    spending = Spending(Budget(tokens=100))
    spending.learn(request(), 1, usage(30))
    assert [spending.reserve(request()) for _ in range(3)] == [None] * 3
    spending.settle(request(), 1, usage(60))
    assert spending.passed() == "60 of 100 tokens are spent"
    spending.settle(request(), 1, usage(30))
    spending.settle(request(), 1, usage(30))
    assert spending.notes() == (
        "20 over the limit of 100 tokens: one of gpt-image-1 auto auto took 60 tokens, the dearest before it 30",
    )


def test_only_what_passed_a_limit_is_named():
    """Not the first of another kind, which was dear when there was enough, nor what earlier batches knew."""
    spending, other = Spending(Budget(tokens=100)), request(size="1536x1024")
    assert spending.reserve(other) is None
    spending.settle(other, 1, usage(80))
    assert spending.reserve(request()) is None
    spending.settle(request(), 1, usage(25))
    spending.learn(other, 1, usage(90))
    assert spending.notes() == (
        "5 over the limit of 100 tokens: one of gpt-image-1 auto auto took 25 tokens, the first",
    )


def test_answers_without_tokens_are_told_of():
    """They can't be counted: the report says so, and the batch goes on side by side."""
    spending = Spending(Budget(tokens=100))
    assert spending.reserve(request()) is None
    spending.settle(request(), 1, Usage())
    assert [spending.reserve(request()) for _ in range(2)] == [None, None]
    assert spending.notes() == ("images without a count of tokens: 1; their cost is an estimate",)


@pytest.mark.parametrize("limit", [Budget(images=0), Budget(tokens=0), Budget(usd=0, prices=BY_TOKENS)])
def test_a_limit_of_nothing_sends_nothing(limit: Budget):
    """Not even the first of a kind, whose cost nobody knows."""
    denial = Spending(limit).reserve(request())
    assert denial is not None
    assert denial.final


def test_threads_reserve_no_more_than_there_is():
    """Eight threads at once get what fits, and no more."""
    spending, gate = Spending(Budget(usd=10, prices=BY_IMAGE)), threading.Barrier(8)

    def take(_: int) -> int:
        gate.wait(10)
        return sum(spending.reserve(request()) is None for _ in range(30))

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(take, range(8))) == 100


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["auto", "1536x1024"])), max_size=40),
    st.integers(0, 400),
)
def test_one_at_a_time_passes_a_limit_by_one_surprise_at_most(costs: list[tuple[int, str]], limit: int):
    """With one in flight, only the last can be dearer than what is left; with constant costs none is, but a first."""
    spending, dearest, surprise = Spending(Budget(tokens=limit)), dict[str, int](), 0
    for cost, size in costs:
        if spending.reserve(request(size=size)) is None:
            spending.settle(request(size=size), 1, usage(cost))
            surprise = max(0, cost - dearest.get(size, 0))
            dearest[size] = max(cost, dearest.get(size, 0))
    assert spending.spent.tokens <= limit + surprise


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"image": 3}, "did you mean images?"),
        ({"images": True}, "is no number"),
        ({"images": -1}, "greater than or equal to 0"),
        ({"images": 1.5}, "fractional part"),
        ({"usd": float("nan"), "prices": BY_IMAGE}, "finite number"),
        ({"usd": float("inf"), "prices": BY_IMAGE}, "finite number"),
        ({"usd": 1}, "usd needs prices"),
        ({"prices": {"gpt-image-1": {"per_image": float("inf")}}}, "finite number"),
        ({"prices": {"gpt-image-1": {"per_image": True}}}, "is no number"),
        ({"prices": {"gpt-image-1": {"per_imag": 1}}}, "did you mean per_image?"),
        ({"prices": {"gpt-image-9": {}}}, "gpt-image-1"),
    ],
)
def test_what_is_no_limit_is_refused(given: dict[str, object], says: str):
    """Whatever can't be counted, or is nobody's name, is an error before anything is sent."""
    with pytest.raises(ValidationError) as caught:
        Budget.model_validate(given)
    assert says in str(caught.value)
