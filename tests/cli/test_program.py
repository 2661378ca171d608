"""The program itself: its version, its help, and what it says of wrong words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefect_ttapi.cli.main import app, main
from prefect_ttapi.results import VERSION
from prefect_ttapi.sandbox.behaviour import FAILURES, LOST

COMMANDS = sorted(name for name in app if not name.startswith("-"))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"prefect-ttapi {VERSION}\n"


def test_the_module_is_the_program_and_a_closed_pipe_is_no_error() -> None:
    """Whoever reads the first line only, as `head -1` does, leads to no complaint."""
    with subprocess.Popen(
        [sys.executable, "-m", "prefect_ttapi", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as asked:
        assert asked.stdout
        assert asked.stderr
        asked.stdout.close()
        assert asked.stderr.read() == b""
        assert asked.wait() == 0


def test_help_needs_nothing_heavy() -> None:
    """The help of every command is told before Prefect, S3 or pictures are imported."""
    code = (
        "import sys; from prefect_ttapi.cli.main import main; "
        f"print(*(main([name, '--help']) for name in {COMMANDS!r}), file=sys.stderr); "
        "print(*sys.modules, file=sys.stderr)"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    statuses, loaded = asked.stderr.splitlines()
    assert set(statuses.split()) == {"0"}
    assert {"prefect", "botocore", "PIL", "httpx"} & set(loaded.split()) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_exit_statuses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "Exit status: 0 " in capsys.readouterr().out


def test_help_names_each_failure_of_the_sandbox(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sandbox", "--help"])
    words = capsys.readouterr().out.replace("│", " ").replace(".", " ").replace(",", " ").split()
    assert {*FAILURES, *LOST} <= set(words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "x.csv", "--stor", "out", "--store", "out"], "--stor"),
        (["run", "x.csv", "--max-im", "3", "--store", "out"], "--max-im"),
        (["ruin"], "ruin"),
        (["run", "--store", "out"], "PROMPTS"),
        (["run", "x.csv", "--store", "out", "--max-images", "many"], "many"),
        (["verify", "~nobody-at-all/x"], "no home"),
        (["verify", "-q", "-v", "out"], "--quiet"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No option can be shortened; what is wrong is named; nothing is a traceback; the status is 2."""
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert says in told.err


def test_no_colours_where_nobody_wants_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["ruin"])
    coloured = capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    main(["ruin"])
    assert "\x1b[" in coloured
    assert "\x1b[3" not in capsys.readouterr().err


def test_models_are_told_with_what_is_legal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "dall-e-3\n" in (told := capsys.readouterr().out)
    assert "vivid, natural" in told
