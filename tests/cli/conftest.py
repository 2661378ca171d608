"""What tests of the command line share."""

from __future__ import annotations

from collections.abc import Iterator

import prefect.main  # noqa: F401 - its log handlers write where stderr was when they were made: not a test's own
import pytest

from prefect_ttapi.cli.reporting import Loudness, loudness


@pytest.fixture(autouse=True)
def as_loud_as_before() -> Iterator[None]:
    """A command with -q or -v, which holds for its process, is not the last word here."""
    yield
    loudness(Loudness.NORMAL)
