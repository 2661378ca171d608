"""A folder to begin with: its prompts, its flow and its deployment belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_ttapi.cli.main import main
from prefect_ttapi.sandbox import Sandbox

FILES = {"prompts.csv", "flow.py", "prefect.yaml"}


@pytest.mark.usefixtures("prefect_server", "sandbox_in_the_environment")
def test_the_flow_works_as_it_is_deployed(tmp_path: Path, sandbox: Sandbox, monkeypatch, capsys) -> None:
    """The deployment's entrypoint, called in its folder with its parameters, delivers what the prompts ask for."""
    folder = tmp_path / "a 'new' place"
    assert main(["init", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == FILES
    project = yaml.safe_load((folder / "prefect.yaml").read_text(encoding="utf-8"))
    (deployment,) = project["deployments"]
    (step,) = project["pull"]
    monkeypatch.chdir(step["prefect.deployments.steps.set_working_directory"]["directory"])
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert "3 generated" in flow(**deployment["parameters"])
    assert {path.name for path in (folder / "website").glob("*.png")} == {
        "lighthouse.png",
        "fox.png",
        "harbour.png",
    }
    assert sandbox.calls == 3


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where one of the files is there, none is written, and the status says so."""
    (tmp_path / "flow.py").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert "has flow.py already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"flow.py"}
    assert (tmp_path / "flow.py").read_text() == "mine"


def test_bootstrap_needs_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None is started for it, and one that can't be reached is told in a line."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert main(["bootstrap"]) == 2
    assert "set PREFECT_API_URL" in capsys.readouterr().err
    nobody = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(nobody):
        assert main(["bootstrap"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the Prefect server at http://127.0.0.1:9/api failed: ")
