"""Prefect's temporary server does not start (its database is of another version, or damaged), or hears Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from prefect_ttapi.sandbox import Sandbox
from tests.support.children import child, until
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
            "prefect_ttapi",
            "run",
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


#: As a person writes it, without a part of the command line: by itself, and in a flow.
SCRIPT = """
import sys
from prefect import flow
from prefect_ttapi import ImageStore, TTAPICredentials, generate_batch

def ships():
    generate_batch(
        [{"prompt": f"ship {number}", "model": "gpt-image-1"} for number in range(30)],
        TTAPICredentials.from_env(),
        ImageStore(url=sys.argv[1]),
        max_in_flight=4,
        grace=2,
    )

(flow(ships) if sys.argv[2] == "flow" else ships)()
"""
#: Seconds beyond the grace: a server that starts again on a busy machine, a usual exit's 5 s.
SLACK = 60.0


@pytest.mark.parametrize(
    ("kind", "times"), [("script", 1), ("flow", 1), ("script", 2), ("flow", 2)], ids=lambda value: str(value)
)
def test_ctrl_c_at_a_terminal_ends_a_script(kind: str, times: int, tmp_path: Path) -> None:
    """It reaches the server, too; the run is recorded all the same, and neither it nor threads hold the script up."""
    log, out = tmp_path / "log", tmp_path / "out"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with Sandbox(tiny=True, latency=600.0) as sandbox:
        environment |= {
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "TTAPI_BASE_URL": sandbox.base_url,
            "TTAPI_API_KEY": "sandbox-key",
        }
        with child(["-c", SCRIPT, str(out), kind], environment, log, start_new_session=True) as process:
            until(lambda: sandbox.in_flight == 4, log)
            os.killpg(process.pid, signal.SIGINT)
            if times == 2:
                until(lambda: "requests under way have" in log.read_text(), log)
                os.killpg(process.pid, signal.SIGINT)
            began = time.monotonic()
            # Python ends threads by force where it leaves at once, which Rust and C++ in one of them may abort for
            aborted = [-signal.SIGABRT] if times == 2 else []
            assert process.wait(PATIENCE) in (130, -signal.SIGINT, *aborted), log.read_text()
            assert time.monotonic() - began < (SLACK if times == 1 else 15.0), log.read_text()
            until(lambda: is_empty(process.pid), log)
    (manifest,) = out.glob("batches/*/manifest.jsonl")
    statuses = [json.loads(line)["status"] for line in manifest.read_text().splitlines()]
    failed = statuses.count("failed")
    assert failed + statuses.count("skipped") == 30
    # two more wait for their turn: where all is left at once, they may not have said yet that they were not sent
    assert failed == 4 if times == 1 else 4 <= failed <= 6
    if times == 1:
        assert "Finished in state Crashed" in log.read_text()
    # what the server says of its own end is its own affair
    assert log.read_text().count("connection attempts failed") < 5, log.read_text()


def is_empty(group: int) -> bool:
    """Nobody of the process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
