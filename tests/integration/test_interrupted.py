"""A batch that is told to end: by Ctrl-C, once and twice, by SIGTERM, from Prefect's API."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from prefect_ttapi.ledger.documents import State
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.chaos import documents
from tests.support.children import child, small_flow, until
from tests.support.prefect_server import PATIENCE, Server

pytestmark = pytest.mark.integration

REQUESTS = 30
STOPPING = "Press Ctrl-C again to leave at once"


def check_that_nothing_is_open(place: ImageStore, sandbox: Sandbox) -> None:
    """What was called is recorded, nothing is claimed any more, and the manifest has a row for each request."""
    states = [document.state for document in documents(place)]
    assert states.count(State.GENERATED) == sandbox.calls
    # a claim of the very moment was given back
    assert set(states) <= {State.GENERATED, State.RELEASED}
    (manifest,) = Path(place.url).glob("batches/*/manifest.jsonl")
    statuses = [json.loads(line)["status"] for line in manifest.read_text().splitlines()]
    assert len(statuses) == REQUESTS
    assert statuses.count("generated") == sandbox.calls == sandbox.paid < REQUESTS
    assert statuses.count("skipped") == REQUESTS - sandbox.calls


def check_that_it_was_told(server: Server, place: ImageStore) -> None:
    """The server has the event of the batch's end, with how much is missing."""
    (manifest,) = Path(place.url).glob("batches/*/manifest.jsonl")
    wanted = {"event": {"name": ["ttapi.batch.completed"]}, "resource": {"id": [manifest.as_uri()]}}
    until(lambda: server.ask("events/filter", filter=wanted)["events"], server.log)
    (told,) = server.ask("events/filter", filter=wanted)["events"]
    assert (told["resource"]["ttapi.ok"], told["resource"]["ttapi.interrupted"]) == ("false", "true")
    statuses = [json.loads(line)["status"] for line in manifest.read_text().splitlines()]
    assert told["payload"]["totals"]["skipped"] == statuses.count("skipped") > 0


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_once_finishes_what_is_under_way(
    sign: signal.Signals, status: int, store: ImageStore, prefect_ui: Server, tmp_path: Path
) -> None:
    """Nothing more is sent, what is under way is recorded, it says how much that is, and the status is the signal's."""
    log = tmp_path / "log"
    with (
        Sandbox(tiny=True, latency=0.5) as sandbox,
        child(small_flow(store, sandbox, REQUESTS), prefect_ui.environment, log) as process,
    ):
        until(lambda: sandbox.paid >= 4 and sandbox.in_flight, log)
        process.send_signal(sign)
        assert process.wait(PATIENCE) == status, log.read_text()
        check_that_nothing_is_open(store, sandbox)
        check_that_it_was_told(prefect_ui, store)
        assert "requests under way have" in log.read_text()
        assert (STOPPING in log.read_text()) == (sign == signal.SIGINT)


def test_twice_leaves_at_once(store: ImageStore, prefect_ui: Server, tmp_path: Path) -> None:
    """A second Ctrl-C ends the process while its threads still wait for answers."""
    log = tmp_path / "log"
    with (
        Sandbox(tiny=True, latency=600.0) as sandbox,
        child(small_flow(store, sandbox, REQUESTS), prefect_ui.environment, log) as process,
    ):
        until(lambda: sandbox.in_flight == 4, log)
        process.send_signal(signal.SIGINT)
        until(lambda: STOPPING in log.read_text(), log)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130, log.read_text()
        assert sandbox.paid == 0
        assert [document.state for document in documents(store)] == [State.CLAIMED] * 4


def test_once_leaves_after_the_grace(store: ImageStore, prefect_ui: Server, tmp_path: Path) -> None:
    """What has no answer by the end of the grace holds up neither the manifest nor the process."""
    log = tmp_path / "log"
    with (
        Sandbox(tiny=True, latency=600.0) as sandbox,
        child(small_flow(store, sandbox, REQUESTS, grace=2.0), prefect_ui.environment, log) as process,
    ):
        until(lambda: sandbox.in_flight == 4, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130, log.read_text()
        assert sandbox.in_flight == 4
        (manifest,) = Path(store.url).glob("batches/*/manifest.jsonl")
        statuses = [json.loads(line)["status"] for line in manifest.read_text().splitlines()]
        assert (statuses.count("failed"), statuses.count("skipped")) == (4, REQUESTS - 4)


def test_at_a_terminal_the_temporary_server_stays(
    store: ImageStore, prefect_ui: Server, tmp_path: Path
) -> None:
    """Ctrl-C goes to all processes of a terminal; the run ends in order all the same, and its server with it."""
    log, prompts = tmp_path / "log", tmp_path / "prompts.csv"
    prompts.write_text("prompt\n" + "".join(f"boat {number}\n" for number in range(REQUESTS)))
    with Sandbox(tiny=True, latency=0.5) as sandbox:
        environment = {
            **prefect_ui.environment,
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "TTAPI_BASE_URL": sandbox.base_url,
            "TTAPI_API_KEY": "sandbox-key",
        }
        del environment["PREFECT_API_URL"]
        command = ["-m", "prefect_ttapi", "run", str(prompts), "--store", store.url, "--max-in-flight", "4"]
        with child(command, environment, log, start_new_session=True) as process:
            until(lambda: sandbox.paid >= 4 and sandbox.in_flight, log)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(PATIENCE) == 130, log.read_text()
            with pytest.raises(ProcessLookupError):  # nobody of its group is left
                os.killpg(process.pid, 0)
        check_that_nothing_is_open(store, sandbox)
    assert "Finished in state Crashed" in log.read_text()


def test_cancelled_from_the_api(store: ImageStore, prefect_ui: Server, tmp_path: Path) -> None:
    """Cancelling a served run stops its batch as SIGTERM does: recorded, listed, and the run is cancelled.

    The next run pays for the rest.
    """
    log, environment = tmp_path / "log", prefect_ui.environment | {"PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with (
        Sandbox(tiny=True, latency=0.5) as sandbox,
        child(small_flow(store, sandbox, REQUESTS, "serve"), environment, log) as served,
    ):
        until(lambda: prefect_ui.ask("deployments/filter", flows={"name": {"any_": ["small"]}}), log)
        (deployment,) = prefect_ui.ask("deployments/filter", flows={"name": {"any_": ["small"]}})
        run = prefect_ui.ask(f"deployments/{deployment['id']}/create_flow_run")
        until(lambda: sandbox.paid >= 4 and sandbox.in_flight, log)
        prefect_ui.ask(f"flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"})
        until(lambda: prefect_ui.state_of(run["id"]) == "CANCELLED", log)
        check_that_nothing_is_open(store, sandbox)
        check_that_it_was_told(prefect_ui, store)
        following = prefect_ui.ask(f"deployments/{deployment['id']}/create_flow_run")
        until(lambda: prefect_ui.state_of(following["id"]) == "COMPLETED", log)
        assert sandbox.calls == sandbox.paid == len(sandbox.paid_by_request) == REQUESTS
        served.send_signal(signal.SIGINT)
        served.wait(PATIENCE)
