"""What is paid for is not put where a deployment's code was pulled to: such a folder goes with the run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import DeploymentResponse

from prefect_ttapi import deliver_images, generate_batch, generate_images
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.runs import pulls_its_code
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore

STEPS = "prefect.deployments.steps."
CLONE = {f"{STEPS}git_clone": {"repository": "https://example.com/pictures.git", "id": "clone"}}
SHELL = {f"{STEPS}run_shell_script": {"script": "git clone https://example.com/pictures.git"}}
#: What the refusal of a store, and of a rescue folder, says.
STORE = r"the store .*/out is in .* Name a place that stays, .*s3://bucket/prefix"
RESCUE = r"the rescue folder .*/rescued is in .* Name a place that stays: set the store's rescue_folder"
TEMPORARY = Path(tempfile.gettempdir()).resolve() / "tmpabcprefect"


def go(directory: str) -> dict[str, Any]:
    return {f"{STEPS}set_working_directory": {"directory": directory}}


@pytest.mark.parametrize(
    ("steps", "pulled"),
    [
        ([CLONE], True),
        ([{f"{STEPS}pull_from_remote_storage": {"url": "s3://code/pictures"}}], True),
        ([{"prefect_aws.deployments.steps.pull_from_s3": {"bucket": "code", "folder": "pictures"}}], True),
        ([CLONE, {f"{STEPS}pip_install_requirements": {"directory": "{{ clone.directory }}"}}], True),
        ([CLONE, go("{{ clone.directory }}/flows")], True),
        ([CLONE, go("flows")], True),
        ([go("/srv/pictures"), CLONE], True),
        ([SHELL, go("pictures")], True),
        ([], True),
        (None, True),
        ([CLONE, go("/srv/pictures")], False),
        ([go("/var/pictures")], False),
        ([go("~/pictures")], False),
        ([go("{{ $PICTURES }}")], False),
        ([go("{{ prefect.variables.pictures }}")], False),
    ],
)
def test_pull_steps_tell(steps: list[dict[str, Any]] | None, pulled: bool) -> None:
    """What a step fetched, or a worker copied, is temporary; a folder that a person names is not."""
    deployment = DeploymentResponse.model_construct(pull_steps=steps, path=None, work_pool_name="images")
    assert pulls_its_code(deployment, TEMPORARY / "pictures") is pulled


@pytest.mark.parametrize(("path", "pulled"), [(".", False), ("$STORAGE_BASE_PATH/pictures", True)])
def test_what_is_served_runs_where_it_was_started(path: str, pulled: bool) -> None:
    """Unless it comes from a repository: then it works in what was pulled."""
    deployment = DeploymentResponse.model_construct(pull_steps=None, path=path, work_pool_name=None)
    assert pulls_its_code(deployment, TEMPORARY) is pulled


@pytest.mark.integration
@pytest.mark.usefixtures("prefect_server")
def test_nothing_is_sent_from_a_clone_into_it(
    sandbox: Sandbox, credentials: TTAPICredentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a task nor by a batch, and nothing is delivered there; what lies outside of the clone is fine."""
    clone, stays = tmp_path / "clone", ImageStore(url=str(tmp_path / "stays"))
    (clone / ".git").mkdir(parents=True)
    (clone / "flows").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(clone / "flows")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    goes = ImageStore(url="../out")

    @flow(persist_result=False)
    def pictures() -> None:
        for pay, way_out in (
            (lambda: generate_images({"prompt": "a fox"}, credentials, goes), STORE),
            (lambda: generate_images({"prompt": "a fox"}, credentials, with_rescue_folder), RESCUE),
            (lambda: generate_batch(["a fox"], credentials, goes), STORE),
            (lambda: generate_batch(["a fox"], credentials, stays, deliver_to=goes), STORE),
            (lambda: generate_batch(["a fox"], credentials, with_rescue_folder), RESCUE),
        ):
            with pytest.raises(StoreError, match=way_out):
                pay()
        assert sandbox.calls == 0
        made = generate_images({"prompt": "a fox"}, credentials, stays)
        with pytest.raises(StoreError, match=STORE):
            deliver_images(made, goes)

    with_rescue_folder = ImageStore(url=stays.url, rescue_folder="./rescued")
    with get_client(sync_client=True) as client:
        deployed = client.create_deployment(client.create_flow(pictures), "from-git", pull_steps=[CLONE])
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", str(deployed))
    pictures()
    assert sandbox.calls == 1
