"""Writing prompts files and reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefect_ttapi.batch.prompts import Prompts, read_prompts
from prefect_ttapi.errors import PromptsError


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Writes a file and reads it as prompts."""

    def write_and_read(data: str | bytes, name: str = "prompts.csv", **options: Any) -> Prompts:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return read_prompts(path, **options)

    return write_and_read


@pytest.fixture
def problems(read: Any) -> Any:
    """The lines of the error that a file gives."""

    def of(data: str | bytes, name: str = "prompts.csv", **options: Any) -> list[str]:
        with pytest.raises(PromptsError) as caught:
            read(data, name, **options)
        summary, *lines = str(caught.value).split("\n")
        assert summary.startswith("'") and f"{name}' " in summary  # noqa: PT018
        return [line.strip() for line in lines]

    return of
