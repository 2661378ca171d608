"""The example automations, created on a real server, act on the events of a real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefect_ttapi.sandbox import Sandbox
from tests.support.prefect_server import Server

pytestmark = pytest.mark.integration


def deployment(server: Server, name: str) -> dict[str, Any]:
    (found,) = server.ask("deployments/filter", deployments={"name": {"any_": [name]}})
    return found


def test_an_empty_account_pauses_its_deployment_and_a_batch_starts_another(
    prefect_ui: Server, tmp_path: Path
) -> None:
    """A campaign that meets a 402 has its deployment paused; its batch's end starts the deployment that reviews it."""
    prefect_ui.run(
        *("-m", "prefect_ttapi", "bootstrap", "--store", str(tmp_path / "store")),
        TTAPI_BASE_URL="http://127.0.0.1:1",
        TTAPI_API_KEY="sandbox",
    )
    prefect_ui.run(
        *("-m", "prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
    )
    nightly = deployment(prefect_ui, "nightly")
    assert not nightly["paused"]

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "[[sandbox:status=402]] a fox"}) + "\n")
    parameters = {"prompts": str(prompts), "name": "nightly", "credentials": None}
    run = prefect_ui.ask(f"deployments/{nightly['id']}/create_flow_run", parameters=parameters)
    with Sandbox(tiny=True) as sandbox:
        prefect_ui.run(
            *("-m", "prefect", "flow-run", "execute", run["id"]),
            TTAPI_BASE_URL=sandbox.base_url,
            TTAPI_API_KEY="sandbox",
        )

    paused = {"name": {"any_": ["nightly"]}, "paused": {"eq_": True}}
    assert prefect_ui.until("deployments/filter", deployments=paused)
    after = {"id": {"any_": [deployment(prefect_ui, "after-batch")["id"]]}}
    (review,) = prefect_ui.until("flow_runs/filter", deployments=after)
    assert (
        review["parameters"]["manifest"] == (tmp_path / f"store/batches/{run['id']}/manifest.jsonl").as_uri()
    )
    (told,) = prefect_ui.ask("events/filter", filter={"event": {"name": ["ttapi.balance.exhausted"]}})[
        "events"
    ]
    assert {"flow-run", "deployment"} <= {resource["prefect.resource.role"] for resource in told["related"]}
    prefect_ui.run("-m", "prefect", "flow-run", "execute", review["id"])
    (ended,) = prefect_ui.ask("flow_runs/filter", flow_runs={"id": {"any_": [review["id"]]}})
    assert ended["state"]["type"] == "FAILED"
    assert "request 0: InsufficientBalanceError" in ended["state"]["message"]
