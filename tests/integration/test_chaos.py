"""Processes that are killed again and again while they pay: who may pay twice, and what is left behind.

`make chaos` does the same for hours of kills, on Ceph as well.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from prefect_ttapi.storage.store import ImageStore
from tests.support.chaos import kill_and_go_on, race
from tests.support.prefect_server import Server
from tests.support.s3 import S3Server

pytestmark = pytest.mark.integration


@pytest.fixture
def places(tmp_path: Path, s3_server: S3Server) -> dict[str, ImageStore]:
    """A store of each kind, with a rescue folder of its own."""
    rescue = str(tmp_path / "rescue")
    return {
        "folder": ImageStore(url=str(tmp_path / "store"), rescue_folder=rescue),
        "s3": ImageStore(
            url=f"s3://{s3_server.new_bucket()}/art", rescue_folder=rescue, **s3_server.settings()
        ),
    }


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_six_processes_pay_once_whoever_is_killed(place: str, places: dict[str, ImageStore]) -> None:
    """Of six processes that want the same, one is killed again and again: only for its own claims is paid again."""
    assert race(places[place], seed=11, kills=40).kills == {signal.SIGKILL.name: 40}


def test_a_batch_comes_to_its_end_whoever_kills_it(
    places: dict[str, ImageStore], tmp_path: Path, prefect_ui: Server
) -> None:
    """Killed ten times at any moment, and run again until done: only SIGKILL costs anything, and all is whole.

    Into a folder and to S3 side by side, as starting a process takes longest.
    """
    logs = [tmp_path / f"{name}.log" for name in places]
    with ThreadPoolExecutor(2) as threads:
        tallies = threads.map(partial(kill_and_go_on, prefect_ui), places.values(), logs, [7, 8])
        assert [tally.kills.total() for tally in tallies] == [10, 10]
