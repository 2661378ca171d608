"""What `import prefect_ttapi` gives, and what it leaves to whoever needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import prefect_ttapi


def test_each_name_is_there() -> None:
    """Each public name is an attribute, listed by `dir`."""
    assert all(getattr(prefect_ttapi, name) is not None for name in prefect_ttapi.__all__)
    assert set(prefect_ttapi.__all__) <= set(dir(prefect_ttapi))


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TTAPIClients'"):
        prefect_ttapi.TTAPIClients  # noqa: B018


@pytest.mark.parametrize(
    ("imports", "heavy"),
    [
        ("from prefect_ttapi.cli.main import main", {"prefect", "botocore", "httpx", "pydantic"}),
        ("from prefect_ttapi import ImageRequest, TTAPIClient, TTAPIError", {"prefect", "botocore"}),
    ],
)
def test_light_names_load_nothing_heavy(imports: str, heavy: set[str]) -> None:
    """The command line starts, and the client works, without Prefect and S3."""
    code = f"import sys; {imports}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert heavy & set(loaded.split()) == set()
