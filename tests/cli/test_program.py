"""The program itself: its version, and what it says of wrong words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefect_ttapi.cli.main import main
from prefect_ttapi.results import VERSION


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"prefect-ttapi {VERSION}\n"


def test_the_module_is_the_program() -> None:
    asked = subprocess.run(
        [sys.executable, "-m", "prefect_ttapi", "--version"], capture_output=True, text=True, check=True
    )
    assert asked.stdout == f"prefect-ttapi {VERSION}\n"
