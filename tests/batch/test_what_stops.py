"""What a failure stops: the batch, the rows of a model, or its own row only. Over HTTP, without a Prefect run."""

from __future__ import annotations

from collections import Counter

import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.batch.dispatch import Dispatch
from prefect_ttapi.batch.items import Item, Work
from prefect_ttapi.batch.lanes import LaneRun, Shared
from prefect_ttapi.batch.options import BatchOptions, Breaker, Sizing
from prefect_ttapi.errors import IllegalBatchError
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import engine_of
from tests.support.hostile import KEY, HostileServer, answer

Told = tuple[str, str | None]


class Batches:
    """Batches of one store, whose requests go out one after the other."""

    def __init__(self, store: ImageStore, client: TTAPIClient) -> None:
        self._store = store
        self._client = client

    def run(
        self,
        *asked: str | tuple[str, str],
        local: bool = True,
        known_absent: bool = True,
        **options: int | None,
    ) -> list[Row]:
        """The rows of a batch of prompts, or of prompts and models."""
        chosen = BatchOptions(max_in_flight=1, **options)
        shared = Shared(Limits(in_flight=1), Breaker(chosen.breaker, chosen.max_refused))
        sizing = Sizing.of(chosen, len(asked), local=local)
        dispatch = Dispatch(sizing, shared, self._client.api_origin, chosen)
        for number, each in enumerate(asked):
            prompt, model = each if isinstance(each, tuple) else (each, "gpt-image-1")
            request = ImageRequest(prompt=f"{prompt} {number}", model=model)
            dispatch.came(Item(number, request, known_absent=known_absent))
        dispatch.source_ended()
        while (lane := dispatch.next_lane(0.0)) is not None:
            seen_by_lane = shared
            if lane.elsewhere:
                limits = Limits(in_flight=1, spending=lane.share)
                seen_by_lane = Shared(limits, Breaker(chosen.breaker, chosen.max_refused))
            engine = engine_of(self._store, self._client, limits=seen_by_lane.limits)
            results = LaneRun(lane, Work(engine, chosen, None), seen_by_lane).results()
            dispatch.returned(lane, results, seconds=0.1)
        assert dispatch.finished
        assert shared.limits.spending.reserved == 0
        return sorted((done.row for done in dispatch.rows), key=lambda row: row.row)


@pytest.fixture
def batches(store: ImageStore, client: TTAPIClient) -> Batches:
    return Batches(store, client)


def told(rows: list[Row]) -> list[Told]:
    return [(row.status, row.error_type) for row in rows]


def fails(name: str) -> str:
    return f"[[sandbox:{name}]]"


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("status=402", "InsufficientBalanceError"),
        ("insufficient_quota", "InsufficientBalanceError"),
        ("no_credit", "InsufficientBalanceError"),
        ("status=401", "AuthenticationError"),
        ("status=403", "AuthenticationError"),
    ],
)
def test_the_account_stops_the_batch_at_the_first(
    batches: Batches, sandbox: Sandbox, name: str, kind: str, local: bool
) -> None:
    """One send is enough, whatever the status; nothing may have been paid for, and the rest says why it is skipped."""
    rows = batches.run("a tree", fails(name), "a tree", "a tree", local=local)
    assert told(rows) == [("generated", None), ("failed", kind), ("skipped", kind), ("skipped", kind)]
    assert not any(row.maybe_paid for row in rows)
    assert str(rows[3].error).startswith("not sent, because an earlier request failed: ")
    assert sandbox.calls == 2


@pytest.mark.parametrize(
    "name", ["no_credit", "insufficient_quota", "moderation", "model_not_permitted", "firewall"]
)
def test_what_was_refused_is_sent_again_by_the_next_run(
    batches: Batches, sandbox: Sandbox, name: str
) -> None:
    """Its claim is given back, whatever the status of the refusal: nothing may have been paid for it."""
    once = f"{fails(name)}{fails('times=1')}"
    assert [row.status for row in batches.run(once) + batches.run(once)] == ["failed", "generated"]
    assert [row.maybe_paid + row.also_paid for row in batches.run(once)] == [()]
    assert sandbox.calls == 2


@pytest.mark.parametrize("local", [True, False])
def test_a_model_that_is_not_permitted_stops_its_rows(
    batches: Batches, sandbox: Sandbox, local: bool
) -> None:
    """The rows of other models go on; however many of the model's fail, they trip no breaker."""
    not_permitted = "ModelNotPermittedError"
    asked = [(fails("model_not_permitted"), "gpt-image-2"), ("a tree", "gpt-image-2"), "a tree", "a tree"]
    rows = batches.run(*asked, local=local, breaker=1)
    assert told(rows) == [
        ("failed", not_permitted),
        ("skipped", not_permitted),
        ("generated", None),
        ("generated", None),
    ]
    assert "must be verified" in str(rows[1].error)
    assert not any(row.maybe_paid for row in rows)
    assert sandbox.calls == 3


def test_what_a_barred_model_made_before_is_there(batches: Batches, sandbox: Sandbox) -> None:
    """A request that is paid for costs nothing, so that it has its images all the same."""
    batches.run("a tree", ("a tree", "gpt-image-2"))
    failing = (fails("model_not_permitted"), "gpt-image-2")
    rows = batches.run(failing, ("a tree", "gpt-image-2"), ("an elm", "gpt-image-2"), known_absent=False)
    assert [row.status for row in rows] == ["failed", "cached", "skipped"]
    assert {row.error_type for row in rows} == {"ModelNotPermittedError", None}
    assert sandbox.calls == 3


def test_refused_prompts_cost_their_rows_and_trip_no_breaker(batches: Batches, sandbox: Sandbox) -> None:
    """However many are refused, as long as one passes in between."""
    rows = batches.run(
        *[fails("moderation")] * 12, "a tree", *[fails("moderation")] * 12, breaker=2, max_refused=13
    )
    assert Counter(told(rows)) == {("failed", "ModerationError"): 24, ("generated", None): 1}
    assert sandbox.calls == 25


@pytest.mark.parametrize(("most", "calls"), [(None, 55), (50, 50), (3, 3)])
def test_max_refused(batches: Batches, sandbox: Sandbox, most: int | None, calls: int) -> None:
    """So many refused prompts in a row, and none that passes, stop the batch; the first fifty do by default."""
    rows = batches.run(*[fails("moderation")] * 55, max_refused=most)
    assert sandbox.calls == calls
    assert Counter(row.status for row in rows) == Counter({"failed": calls, "skipped": 55 - calls})
    assert {row.error_type for row in rows} == {"ModerationError"}
    assert BatchOptions().max_refused == 50
    skipped = [str(row.error) for row in rows if row.status == "skipped"]
    assert all(f"{most} prompts in a row were refused, and none passed" in reason for reason in skipped)


def test_max_refused_is_at_least_one() -> None:
    """None turns it off; 0 makes no sense."""
    BatchOptions(max_refused=None).check()
    with pytest.raises(IllegalBatchError, match="max_refused must be a whole number of at least 1, not 0"):
        BatchOptions(max_refused=0).check()


def test_a_firewalls_page_costs_its_row_and_counts(batches: Batches, sandbox: Sandbox) -> None:
    """One is about a prompt's words; many in a row are about this machine, and stop the batch."""
    rows = batches.run(fails("firewall"), "a tree", *[fails("firewall")] * 4, breaker=3)
    refused = "InvalidRequestError"
    assert told(rows) == [
        ("failed", refused),
        ("generated", None),
        *[("failed", refused)] * 3,
        ("skipped", refused),
    ]
    assert "3 requests in a row failed" in str(rows[-1].error)
    assert not any(row.maybe_paid for row in rows)
    assert sandbox.calls == 5


def test_an_unknown_answer_says_what_it_was_taken_for(store: ImageStore) -> None:
    """The row has it, with the status and why."""
    with HostileServer(answer(418, b"tea")) as server, TTAPIClient(KEY, server.url) as client:
        (row,) = Batches(store, client).run("a tree")
    assert str(row.error).startswith(
        "tea (HTTP 418, taken for a refusal of this request: 4xx that is not in the table, outcome: refused for good"
    )
