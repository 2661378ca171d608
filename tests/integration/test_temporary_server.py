"""Prefect's temporary server does not start: its database is of another version, or damaged."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.prefect_server import PATIENCE, ROOT

pytestmark = pytest.mark.integration


def newer(database: Path) -> None:
    """As a later version of Prefect leaves it."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version VALUES ('ffffffffffff')")


def damaged(database: Path) -> None:
    database.write_bytes(b"no database" * 100)


@pytest.mark.parametrize(
    ("broken", "said"),
    [(newer, "Can't locate revision identified by 'ffffffffffff'"), (damaged, "file is not a database")],
)
def test_the_error_is_one_line_that_says_what_the_server_said(broken, said: str, tmp_path: Path) -> None:
    """The command line ends long before Prefect gives up (120 s), nothing is called, and one line tells the reason."""
    broken(tmp_path / "prefect.db")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "flows.campaign",
            "flows/prompts.csv",
            "--sandbox",
            "--store",
            str(tmp_path / "out"),
        ],
        cwd=ROOT,
        env=environment | {"PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in error
    assert f"Set PREFECT_HOME, now {tmp_path}" in error
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/images/*"))
