"""The exception tree: its shape, its words, and that nothing of it is lost between processes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi import errors
from prefect_ttapi.errors import (
    ACCOUNT_ERRORS,
    APIConnectionError,
    AuthenticationError,
    BatchError,
    BudgetExceeded,
    DownloadError,
    IllegalBatchError,
    ImageMissingError,
    InsufficientBalanceError,
    InvalidRequestError,
    InvalidResponseError,
    ModelNotPermittedError,
    ModerationError,
    Outcome,
    QueueFullError,
    RateLimitError,
    ServerError,
    StoreError,
    TTAPIError,
    UnknownOutcomeError,
)

#: Class, its parent, and what its outcome is where nobody says otherwise.
TREE: list[tuple[type[TTAPIError], type[Exception], str]] = [
    (TTAPIError, Exception, "unknown"),
    (InvalidRequestError, TTAPIError, "refused for good"),
    (ModerationError, InvalidRequestError, "refused for good"),
    (AuthenticationError, TTAPIError, "refused for good"),
    (InsufficientBalanceError, TTAPIError, "refused for good"),
    (ModelNotPermittedError, TTAPIError, "refused for good"),
    (RateLimitError, TTAPIError, "rejected before work"),
    (QueueFullError, TTAPIError, "rejected before work"),
    (ServerError, TTAPIError, "server fault"),
    (APIConnectionError, TTAPIError, "never delivered"),
    (UnknownOutcomeError, TTAPIError, "unknown"),
    (InvalidResponseError, TTAPIError, "answered but unusable"),
    (DownloadError, TTAPIError, "answered but unusable"),
]
API_ERRORS = [cls for cls, _, _ in TREE]


def test_no_error_is_missing() -> None:
    """Every API error of the module is in this file's tree, and every error in the module's drawing."""
    defined = {
        thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, Exception)
    }
    assert {cls for cls in defined if issubclass(cls, TTAPIError)} == set(API_ERRORS)
    assert {cls.__name__ for cls in defined} <= set(re.findall(r"\w+", str(errors.__doc__)))


@pytest.mark.parametrize(("cls", "parent", "outcome"), TREE)
def test_the_tree(cls: type[TTAPIError], parent: type[Exception], outcome: str) -> None:
    """Each API error has its parent and the outcome that decides whether it may be sent again."""
    assert cls.__bases__ == (parent,)
    assert cls("x").outcome is Outcome(outcome)
    assert cls("x", outcome=Outcome.NEVER_DELIVERED).outcome is Outcome.NEVER_DELIVERED


def test_what_is_no_answer_of_the_api_is_outside_its_tree() -> None:
    """Trouble with the store, the budget or a batch is never caught by `except TTAPIError`."""
    for cls in (StoreError, ImageMissingError, BudgetExceeded, BatchError):
        assert not issubclass(cls, TTAPIError)
    assert issubclass(ImageMissingError, StoreError)


def test_account_errors_are_those_that_stop_a_batch() -> None:
    """401, 402 and 403 are the errors after which every later call would fail."""
    assert set(ACCOUNT_ERRORS) == {AuthenticationError, InsufficientBalanceError}


def test_facts_default_to_nothing_known() -> None:
    """An error that was told only a message claims no status, id or wait, and one attempt."""
    error = TTAPIError("no answer")
    assert (error.message, error.status_code, error.request_id, error.retry_after) == (
        "no answer",
        None,
        None,
        None,
    )
    assert (error.attempts, error.elapsed) == (1, 0.0)
    assert error.args == ("no answer",)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (APIConnectionError("refused"), "refused (outcome: never delivered)"),
        (
            RateLimitError("slow down", status_code=429, attempts=4, elapsed=7.26, request_id="r-1"),
            "slow down (HTTP 429, 4 attempts in 7.3 s, outcome: rejected before work, request id r-1)",
        ),
        (
            InvalidRequestError("I'm a teapot", status_code=418, taken_for="a refusal: 4xx"),
            "I'm a teapot (HTTP 418, taken for a refusal: 4xx, outcome: refused for good)",
        ),
        (InvalidRequestError("bad size", status_code=400), "bad size (HTTP 400, outcome: refused for good)"),
        (
            UnknownOutcomeError("read timeout", not_resent="it may be paid"),
            "read timeout (outcome: unknown, not sent again: it may be paid)",
        ),
    ],
)
def test_an_error_reads_as_one_line(error: TTAPIError, text: str) -> None:
    """The message comes first, then the facts that are known, in words."""
    assert str(error) == text


facts = st.fixed_dictionaries(
    {
        "status_code": st.none() | st.integers(100, 599),
        "request_id": st.none() | st.text(max_size=20),
        "outcome": st.sampled_from(Outcome),
        "attempts": st.integers(1, 9),
        "elapsed": st.floats(0, 1e6),
        "retry_after": st.none() | st.floats(0, 1e6),
        "not_resent": st.none() | st.text(max_size=20),
        "taken_for": st.none() | st.text(max_size=20),
    }
)


@given(st.sampled_from(API_ERRORS), st.text(max_size=40), facts)
def test_copies_keep_everything(cls: type[TTAPIError], message: str, told: dict[str, object]) -> None:
    """Pickle, copy and deepcopy keep class, message, every fact and notes."""
    error = cls(message, **told)  # type: ignore[arg-type]
    error.add_note("while testing")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is cls
        assert vars(twin) == vars(error)
        assert (str(twin), twin.args) == (str(error), error.args)
        assert twin.__notes__ == ["while testing"]


def test_a_batch_error_keeps_its_report() -> None:
    """A pickled BatchError still has message and report."""
    twin = pickle.loads(pickle.dumps(BatchError("2 of 9 failed", report={"failed": 2})))
    assert (str(twin), twin.report) == ("2 of 9 failed", {"failed": 2})
    assert BatchError("x").report is None


def test_an_illegal_batch_keeps_its_problems() -> None:
    """The message shows twenty problems and counts the others; a pickle keeps them all."""
    problems = [f"request {row}: n is 0" for row in range(30)]
    error = IllegalBatchError(problems)
    twin = pickle.loads(pickle.dumps(error))
    assert twin.problems == error.problems == problems
    assert str(twin) == str(error)
    assert str(error).split("\n")[-2:] == ["  request 19: n is 0", "  and 10 more"]


def _fail() -> None:
    raise RateLimitError("slow down", status_code=429, retry_after=2.5, attempts=3)


def test_errors_cross_processes() -> None:
    """An error raised in another process arrives with its facts, as distributed task runners need it to."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        raised = pool.submit(_fail).exception()
    assert isinstance(raised, RateLimitError)
    assert (raised.status_code, raised.retry_after, raised.attempts) == (429, 2.5, 3)


def test_outcomes_have_the_words_that_records_hold() -> None:
    """Ledger and manifest store these words: they never change."""
    assert {outcome.name: outcome.value for outcome in Outcome} == {
        "NEVER_DELIVERED": "never delivered",
        "REJECTED": "rejected before work",
        "SERVER_FAULT": "server fault",
        "UNKNOWN": "unknown",
        "UNUSABLE": "answered but unusable",
        "REFUSED": "refused for good",
    }
