"""Paying once without any Prefect run: client, store and ledger together, against the sandbox."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.errors import (
    InvalidRequestError,
    Outcome,
    ServerError,
    StoreError,
    TTAPIError,
    UnknownOutcomeError,
)
from prefect_ttapi.generation.limits import Limits, perhaps_paid
from prefect_ttapi.generation.persisting import Paid, other_payments
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import payment
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import WatchedLimits, engine_of, run_of
from tests.support.hostile import HostileServer, answer, answered, b64, png
from tests.support.ledgers import Clock
from tests.support.meddling import meddling_proxy
from tests.support.quirks import quirky_server
from tests.support.s3 import S3Server


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[TTAPIClient]:
    with TTAPIClient("sandbox-key", sandbox.base_url, read_timeout=2) as client:
        yield client


def ledger_of(store: ImageStore, run: str) -> Ledger:
    return Ledger(store, "sandbox", run)


def request_for(prompt: str, **fields: object) -> ImageRequest:
    return ImageRequest.model_validate({"prompt": prompt, "model": "gpt-image-1"} | fields)


def test_the_first_pays_and_the_next_finds_it(store, client, sandbox: Sandbox):
    """The second call has the first one's answer, and has no bytes at hand."""
    request = request_for("a kite", n=2)
    first = engine_of(store, client, "one", run=run_of(flow_run_id="flow", task_run_id="task")).generate(
        request
    )
    second = engine_of(store, client, "two").generate(request)
    assert (first.sent, second.sent) == (True, False)
    assert second.generation == first.generation
    assert (first.generation.flow_run_id, first.generation.task_run_id) == ("flow", "task")
    assert [image.sha256 for image in first.fresh] == [image.sha256 for image in first.generation.images]
    assert second.fresh == ()
    assert sandbox.calls == 1


def test_sixteen_threads_pay_once(store, client, sandbox: Sandbox):
    """Threads that ask for the same at the same moment send it once, and all have the answer."""
    request = request_for("a crowd")
    with ThreadPoolExecutor(16) as threads:
        paid = list(threads.map(lambda n: engine_of(store, client, f"{n}").generate(request), range(16)))
    assert sum(one.sent for one in paid) == 1
    assert len({one.generation.model_dump_json() for one in paid}) == 1
    assert sandbox.calls == 1


@pytest.mark.parametrize(
    ("steering", "calls", "outcome"),
    [
        ("[[sandbox:status=400]]", 1, Outcome.REFUSED),
        ("[[sandbox:moderation]]", 1, Outcome.REFUSED),
        ("[[sandbox:status=402]]", 1, Outcome.REFUSED),
    ],
)
def test_what_was_surely_not_paid_is_free_to_be_sent_again(
    store, client, sandbox: Sandbox, steering: str, calls: int, outcome: Outcome
):
    """A refusal gives the claim back: the same run may ask again at once."""
    request = request_for(f"{steering} no")
    ledger = ledger_of(store, "one")
    for _ in range(2):
        with pytest.raises(TTAPIError) as refused:
            engine_of(store, client, ledger).generate(request)
        assert refused.value.outcome == outcome
    assert sandbox.calls == 2 * calls


def test_an_unknown_outcome_is_not_sent_again_within_the_run(store, client, sandbox: Sandbox):
    """After a 504 the same run is refused without a call; a new run sends it, and its record says what went before."""
    request = request_for("[[sandbox:status=504]] [[sandbox:times=1]] a slow picture")
    with pytest.raises(UnknownOutcomeError):
        engine_of(store, client, "one").generate(request)
    with pytest.raises(UnknownOutcomeError, match="within one run it is not sent again"):
        engine_of(store, client, "one").generate(request)
    assert sandbox.calls == 1
    paid = engine_of(store, client, "two").generate(request)
    assert [note.run_id for note in paid.record.maybe_paid] == ["one"]
    assert sandbox.calls == 2


def test_a_resent_server_fault_is_named(store, client, sandbox: Sandbox):
    """A 503 that is sent again is in the record: it may have been paid for, too."""
    paid = engine_of(store, client, "one").generate(
        request_for("[[sandbox:status=503]] [[sandbox:times=1]] at last")
    )
    assert paid.generation.api_calls == 2
    assert paid.generation.earlier_outcomes == (Outcome.SERVER_FAULT,)
    assert sandbox.calls == 2


def test_without_room_for_the_answer_nothing_is_sent(
    store, client, sandbox: Sandbox, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    """Where no temporary file can be written, an answer would be paid for and lost: nothing is sent."""
    with monkeypatch.context() as full:
        full.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(StoreError, match="nothing is sent: no temporary file can be written"):
            engine_of(store, client, "one").generate(request_for("a full house"))
    assert sandbox.calls == 0
    assert engine_of(store, client, "one").generate(request_for("a full house")).sent


@pytest.mark.parametrize(
    ("full", "says"),
    [
        ("store", "the store's disk has 4,096 bytes"),
        ("rescue", "the rescue folder's disk has 4,096 bytes"),
        ("tmp", "4,096 bytes are free"),
    ],
)
def test_on_a_disk_that_is_nearly_full_nothing_is_sent(
    client, sandbox: Sandbox, tmp_path, monkeypatch: pytest.MonkeyPatch, full: str, says: str
):
    """A claim may fit where an image does not: what each image may need must be free before anything is sent."""
    (tmp_path / full).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp") if full == "tmp" else None)
    statvfs, little = os.statvfs, SimpleNamespace(f_bavail=1, f_frsize=4096, f_blocks=1000)
    monkeypatch.setattr(os, "statvfs", lambda path: little if path == tmp_path / full else statvfs(path))
    store = ImageStore(url=str(tmp_path / "store"), rescue_folder=str(tmp_path / "rescue"))
    with pytest.raises(StoreError, match=f"nothing is sent: .*{says}"):
        engine_of(store, client, "one").generate(request_for("a nearly full house"))
    assert sandbox.calls == 0


def test_a_store_that_fails_between_two_sends_hides_no_payment(store, client, sandbox: Sandbox, tmp_path):
    """After a 503 nothing more is sent without a proven claim; the error is that of the 503, perhaps paid for."""
    request = request_for("[[sandbox:status=503]] [[sandbox:times=1]] in between")
    ledger = Ledger(store, "sandbox", "one", ttl=0.3)

    def lose_the_store(number: int) -> None:
        if number == 2:
            documents = Path(ledger.documents.key(request.request_hash)).parent
            (Path(store.url) / documents).rename(tmp_path / "away")
            (Path(store.url) / documents).touch()
            time.sleep(0.3)

    with pytest.raises(ServerError, match=r"not sent again: .*a file is in the way") as error:
        engine_of(store, client, ledger, limits=WatchedLimits(lose_the_store)).generate(request)
    assert perhaps_paid(error.value)
    assert sandbox.calls == 1


def test_a_stream_counts_its_sends(store, client, sandbox: Sandbox):
    """A stream's previews are handed on; its image, sends and request id are recorded as those of a plain call."""
    previews: list[int] = []
    prompt = "[[sandbox:status=503]] [[sandbox:times=1]] a wave"
    engine = engine_of(store, client, "one", on_preview=lambda preview: previews.append(preview.index))
    paid = engine.generate(request_for(prompt, stream=True, partial_images=2))
    made = paid.generation
    assert previews == [0, 1]
    assert (made.api_calls, made.earlier_outcomes) == (2, (Outcome.SERVER_FAULT,))
    assert made.request_id == "req-2"
    assert made.seconds > 0
    assert made.usage is not None
    assert not engine_of(store, client, "two").generate(request_for(prompt)).sent


def test_a_stream_that_fails_after_an_image_keeps_it(store):
    """A finished image is paid for: what befalls the next one does not throw it away, nor pay for it again."""
    finished = f'data: {{"type": "image_generation.completed", "b64_json": "{b64(png())}"}}\n\n'
    events = f'{finished}data: {{"error": "late"}}\n\n'
    request = request_for("two waves", n=2, stream=True)
    with HostileServer(answer(200, events.encode(), {"Content-Type": "text/event-stream"})) as server:
        with TTAPIClient("any-key", server.url) as client:
            first = engine_of(store, client, "one").generate(request)
            second = engine_of(store, client, "two").generate(request)
        assert [image.read_bytes() for image in first.fresh] == [png()]
        assert second.generation == first.generation
        assert len(server.requests) == 1


def test_a_store_that_is_down_sends_nothing(client, sandbox: Sandbox):
    """Without a store nobody can know what was paid for, so nothing is sent."""
    nowhere = ImageStore(
        url="s3://bucket", endpoint_url="http://127.0.0.1:9", access_key_id="key", secret_access_key="secret"
    )
    with pytest.raises(StoreError):
        engine_of(nowhere, client, "one").generate(request_for("a hope"))
    assert sandbox.calls == 0


def test_a_busy_store_is_waited_for_until_it_answers_or_the_run_stops(
    s3_server: S3Server, client, sandbox: Sandbox
):
    """While nothing is paid a store that asks to slow down is waited for; a stop ends the wait, and nothing is sent."""
    with quirky_server(s3_server) as quirky:
        engine_of(quirky.store("SlowDown at first"), client).generate(request_for("a jetty"))
        assert sandbox.calls == 1
        stop, store = Stop(), quirky.store()
        store.check_once()
        quirky.proxy.meddle = lambda *_: 503
        threading.Timer(0.3, stop.set, ["Ctrl-C"]).start()
        with pytest.raises(StopSending, match="Ctrl-C"):
            engine_of(store, client, limits=Limits(stop)).generate(request_for("a pier"))
        assert sandbox.calls == 1


@pytest.mark.parametrize(("status", "why"), [(403, "the credentials don't allow it"), (507, "HTTP 507")])
def test_a_store_that_stops_taking_writes_sends_nothing(
    s3_server: S3Server, client, sandbox: Sandbox, status: int, why: str
):
    """Read-only, full or expired: what can't be claimed is not sent, and the error says why."""

    def refuse_claims(method: str, path: str, headers: dict[str, str]) -> int | None:
        return status if method == "PUT" and "/ledger/sandbox/" in path else None

    with meddling_proxy(s3_server.url, refuse_claims) as proxy:
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        with pytest.raises(StoreError, match=why):
            engine_of(store, client, "one").generate(request_for("a wish"))
    assert sandbox.calls == 0


def test_another_apis_images_are_not_its_own(store, client, sandbox: Sandbox):
    """One store, two APIs, the same request: each is asked once, and each has its own images."""
    request = request_for("a twin")
    ours = engine_of(store, client, "one").generate(request)
    with HostileServer(answer(200, answered(png()))) as server, TTAPIClient("any-key", server.url) as other:
        for run in ("two", "three"):
            ledger = Ledger(store, other.api_origin, run)
            assert (
                engine_of(store, other, ledger).generate(request).generation.images != ours.generation.images
            )
        assert len(server.requests) == 1
    assert engine_of(store, client, "four").generate(request).generation == ours.generation
    assert sandbox.calls == 1


def test_the_claim_is_proven_after_what_waits_before_a_send(
    store, client, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
):
    """A turn to send may take long: who lost the claim meanwhile sends nothing. What it raises sends nothing either."""
    clock, numbers = Clock(monkeypatch), []
    ledger = Ledger(store, "sandbox", "one")
    request = request_for("a queue")

    def wait(number: int) -> None:
        numbers.append(number)
        if len(numbers) == 1:
            raise ZeroDivisionError
        if len(numbers) == 2:
            clock.now += 100
            store.objects.delete(ledger.documents.key(request.request_hash))
        assert sandbox.calls == 0

    with pytest.raises(ZeroDivisionError):
        engine_of(store, client, ledger, limits=WatchedLimits(wait)).generate(request)
    assert engine_of(store, client, ledger, limits=WatchedLimits(wait)).generate(request).sent
    assert numbers == [1, 1, 1]
    assert sandbox.calls == 1


def test_who_else_paid_is_told_for_people(store, client):
    """Payments that may have been, and those in vain, are apart, in words."""
    paid = engine_of(store, client, "one").generate(request_for("a bill"))
    notes = [payment(name, name, f"sent by {name}") for name in ("first", "second")]
    made = paid.generation.model_copy(update={"earlier_outcomes": (Outcome.REJECTED, Outcome.SERVER_FAULT)})
    record = paid.record.model_copy(
        update={"generation": made, "maybe_paid": (notes[0],), "also_paid": (notes[1],)}
    )
    assert other_payments(Paid(record, sent=True)) == (
        ("an earlier send of the same call: server fault", "run first: sent by first"),
        ("run second: sent by second",),
    )


def test_who_comes_second_has_the_records_images_and_says_so(store, client, sandbox: Sandbox, caplog):
    """An answer that came second is noted, told of in the log, and its pictures are not shown for the record's."""
    request = request_for("a tie")
    key = ledger_of(store, "any").documents.key(request.request_hash)

    def be_overtaken() -> None:
        store.remove(key)
        with Sandbox(tiny=True, seed=9) as other, TTAPIClient("sandbox-key", other.base_url) as quick:
            engine_of(store, quick, "first").generate(request)

    second = engine_of(store, client, "second", limits=WatchedLimits(on_answer=be_overtaken)).try_generate(
        request
    )
    assert isinstance(second, Paid)
    assert second.record.run_id == "first"
    assert [note.run_id for note in second.record.also_paid] == ["second"]
    assert second.fresh == ()
    assert f"request {request.request_hash[:12]} was paid for twice" in caplog.text
    assert sandbox.calls == 1


@pytest.mark.parametrize("failures", [0, 1], ids=["the first send", "a repeated send"])
def test_a_request_is_not_written_on_a_lease_that_ran_out_while_connecting(
    store, client, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, failures: int
):
    """Connecting may take longer than a claim lives: what is then still unwritten stays unwritten, and unpaid."""
    clock, connect, connections = Clock(monkeypatch), socket.create_connection, []

    def slowly(*args: Any, **options: Any) -> socket.socket:
        connections.append(1)
        clock.now += 55 if len(connections) > failures else 0
        return connect(*args, **options)

    monkeypatch.setattr(socket, "create_connection", slowly)
    request = request_for(
        f"[[sandbox:status=503]] [[sandbox:times={failures}]] a causeway" if failures else "a causeway"
    )
    error = ServerError if failures else StoreError
    with pytest.raises(error, match="took too long to renew: nothing was sent"):
        engine_of(store, client, Ledger(store, "sandbox", "run", ttl=60)).generate(request)
    assert (sandbox.calls, len(connections)) == (failures, failures + 1)
    found = Ledger(store, "sandbox", "another", ttl=60).try_acquire(request.request_hash)
    assert isinstance(found, Claim)
    assert len(found.maybe_paid) == failures


def test_an_illegal_answer_is_an_error_of_the_request(store, client, sandbox: Sandbox):
    """What the server refuses though our table allows it is its own error."""
    with pytest.raises(InvalidRequestError):
        engine_of(store, client, "one").generate(
            ImageRequest(prompt="huge", model="gpt-image-2", size="16000x16000")
        )
    assert sandbox.paid == 0
