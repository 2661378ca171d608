"""How a batch is cut into lanes, for batches of any size on any kind of task runner."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.batch.options import BatchOptions, Sizing, workers


def sizing_of(
    total: int | None, in_flight: int, shard_size: int | None = None, *, local: bool = True
) -> Sizing:
    return Sizing.of(BatchOptions(max_in_flight=in_flight, shard_size=shard_size), total, local=local)


def task_runs(total: int, sizing: Sizing, seconds: float) -> list[int]:
    """The sizes of all lanes, where each request takes so many seconds, lane after lane."""
    sizes, rest = [], total
    while rest:
        size = min(rest, sizing.size(rest))
        sizes.append(size)
        rest -= size
        if len(sizes) > sizing.enough:  # before that, none has come back
            sizing = sizing.measured(size, size * seconds / sizing.width)
    return sizes


def test_a_small_batch_has_a_task_run_for_each_request():
    """Up to 300 requests in threads: each is seen by itself, however quick they are."""
    assert set(task_runs(300, sizing_of(300, 8), 0.01)) == {1}


@pytest.mark.parametrize("in_flight", [1, 8, 32])
@pytest.mark.parametrize("local", [True, False])
def test_ten_thousand_quick_requests_are_some_hundred_task_runs(in_flight: int, local: bool):
    """A server of 20 task runs a second is never the bound: lanes get longer the quicker requests are."""
    sizing = sizing_of(10_000, in_flight, local=local)
    # the machine is busy with all that are under way: the more there are, the longer each takes
    assert len(task_runs(10_000, sizing, 0.02 * sizing.enough)) <= 600


def test_slow_requests_make_lanes_of_fifteen_seconds():
    """Where each takes 6 s, a lane is two of them; at the end, when fewer are left than lanes, each is one."""
    sizes = task_runs(10_000, sizing_of(10_000, 32), 6.0)
    assert max(sizes) == 2
    assert sizes[-1] == 1


@given(
    st.integers(1, 100),
    st.none() | st.integers(1, 200),
    st.booleans(),
    st.none() | st.integers(1, 5_000),
    st.floats(0.0, 100.0),
)
def test_widths_never_add_up_to_more_than_may_be_in_flight(
    in_flight: int, shard_size: int | None, local: bool, total: int | None, pace: float
):
    """Elsewhere, where nobody shares places, open lanes have at most `max_in_flight` together; a lane has an item."""
    sizing = replace(sizing_of(total, in_flight, shard_size, local=local), pace=pace)
    assert 1 <= sizing.width <= in_flight
    if not local:
        assert (sizing.most - 1) * sizing.width < in_flight <= sizing.most * sizing.width
    else:
        assert sizing.most * sizing.width >= workers(in_flight)
    assert sizing.size(total) >= 1
    assert shard_size is None or sizing.size(total) == shard_size


@given(st.integers(2, 100), st.floats(0.001, 100.0), st.integers(1, 10_000))
def test_lanes_elsewhere_are_whole_rounds(in_flight: int, pace: float, rest: int):
    """All places of a lane are in use to its end, where requests take equally long."""
    sizing = replace(sizing_of(10_000, in_flight, local=False), pace=pace)
    assert sizing.size(rest) % sizing.width == 0
