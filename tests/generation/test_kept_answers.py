"""An answer that is paid for and can't be read is kept, and read again before anything is paid for anew."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.batch.items import Done, Item, Work
from prefect_ttapi.batch.options import BatchOptions
from prefect_ttapi.errors import (
    DownloadError,
    InvalidRequestError,
    InvalidResponseError,
    NotStoredError,
    TTAPIError,
    UnknownOutcomeError,
)
from prefect_ttapi.generation.budget import Budget, Spending
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.generation.persisting import Paid
from prefect_ttapi.generation.rescue import RescueFolder
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import engine_of, run_of
from tests.support.hostile import Behaviour, HostileServer, Wire, answer, answered, cut, png
from tests.support.ledgers import acquire

REQUEST = ImageRequest(prompt="a sealed letter", model="gpt-image-1")
HASH = REQUEST.request_hash
PAGE = answer(200, b"<html>thank you for your order</html>", {"Content-Type": "text/html"})
REFUSED = answer(400, {"error": {"message": "no"}})


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer(PAGE) as server:
        yield server


@pytest.fixture
def client(server: HostileServer) -> Iterator[TTAPIClient]:
    with TTAPIClient("any-key", server.url) as client:
        yield client


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """A store with no patience, and a rescue folder of its own."""
    return impatient(ImageStore(url=str(tmp_path / "store")), tmp_path)


def impatient(store: ImageStore, tmp_path: Path) -> ImageStore:
    return store.model_copy(update={"patience": 0, "rescue_folder": str(tmp_path / "rescue")})


def linked(server: HostileServer) -> Behaviour:
    """An answer whose image is behind a URL of the same server."""
    return answer(200, {"data": [{"url": f"{server.url}/x.png"}]})


def as_events(server: HostileServer) -> Behaviour:
    """The same as a stream."""
    event = {"type": "image_generation.completed", "url": f"{server.url}/x.png"}
    return answer(200, f"data: {json.dumps(event)}\n\n".encode(), {"Content-Type": "text/event-stream"})


def pay(store: ImageStore, client: TTAPIClient, payer: str | Ledger, **options: Any) -> Paid:
    return engine_of(store, client, payer, **options).generate(REQUEST)


def opted_in(store: ImageStore, client: TTAPIClient, run: str) -> Ledger:
    return Ledger(store, client.api_origin, run, retry_unknown_outcome=True)


def refused(
    store: ImageStore, client: TTAPIClient, payer: str | Ledger, kind: type[TTAPIError] = InvalidResponseError
) -> TTAPIError:
    """Ask for the images, which can't be had."""
    with pytest.raises(kind) as caught:
        pay(store, client, payer)
    return caught.value


def sends(server: HostileServer) -> int:
    return sum(request.method == "POST" for request in server.requests)


def bodies(store: ImageStore) -> list[str]:
    """The keys of the answers that are kept in the store."""
    return [found.key for found in store.list("answers/")]


def document(store: ImageStore, client: TTAPIClient) -> dict[str, Any]:
    return json.loads(store.read(Ledger(store, client.api_origin, "reader").documents.key(HASH)))


def rescued(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "rescue").rglob("*") if path.is_file()]


@pytest.mark.parametrize("run", ["one", "two"], ids=["a retry of the run", "another run"])
def test_a_url_that_was_down_is_fetched_by_the_next_run(
    each_store: ImageStore, client, server: HostileServer, tmp_path, caplog, run: str
):
    """The URL is kept with its answer; who asks next has the image, pays nothing, and leaves nothing behind."""
    caplog.set_level(logging.INFO, "prefect_ttapi")
    store = impatient(each_store, tmp_path)
    server.play(linked(server), answer(503), answer(200, png()))
    with pytest.raises(DownloadError) as error:
        pay(store, client, "one", run=run_of(flow_run_id="flow"))
    (key,) = bodies(store)
    assert f"it is kept at {store.uri(key)}: the next run reads it again" in str(error.value)
    assert json.loads(store.read(key))["data"][0]["url"] == f"{server.url}/x.png"
    assert store.uri(key) in caplog.text

    paid = pay(store, client, run, result_key="mine")
    assert not paid.sent
    assert [image.read_bytes() for image in paid.fresh] == [png()]
    assert store.read_bytes(paid.generation.images[0].uri) == png()
    assert (paid.record.run_id, paid.record.result_key) == ("one", "mine")
    assert (paid.generation.flow_run_id, paid.generation.api_calls) == ("flow", 1)
    assert paid.record.maybe_paid == paid.record.also_paid == ()
    assert bodies(store) == []
    assert "its answer could be read now, and nothing was sent" in caplog.text
    assert pay(store, client, "three").generation == paid.generation
    assert sends(server) == 1


def test_a_newer_version_reads_what_an_older_one_could_not(store, client, server: HostileServer):
    """What one version can't read, here because it is too long for it, is read by one that can."""
    server.play(
        answer(200, answered(png(), usage={"total_tokens": 9, "input_tokens": 4, "output_tokens": 5}))
    )
    with TTAPIClient("any-key", server.url, max_body_bytes=20) as older:
        refused(store, older, "one")
    paid = pay(store, client, "two")
    assert [image.read_bytes() for image in paid.fresh] == [png()]
    assert paid.generation.usage is not None
    assert paid.generation.usage.total_tokens == 9
    assert sends(server) == 1


@pytest.mark.parametrize("run", ["one", "two"], ids=["a retry of the run", "another run"])
def test_while_it_can_not_be_read_nothing_is_sent(store, client, server: HostileServer, run: str):
    """Each later run raises the same error, of no attempt of its own, and says where the answer is."""
    first = refused(store, client, "one")
    for _ in range(2):
        later = refused(store, client, run)
        assert (later.attempts, later.message, later.kept_at) == (0, first.message, first.kept_at)
    assert len(bodies(store)) == 1
    assert document(store, client)["state"] == "unknown"
    assert sends(server) == 1


def test_a_refresh_pays_anew(store, client, server: HostileServer):
    """Who refreshes sends at once; with the new answer recorded, the old one goes, and its payment stays noted."""
    refused(store, client, "one")
    server.play(answer(200, answered(png())))
    paid = pay(store, client, "two", not_before=datetime.now(UTC))
    assert paid.sent
    assert [note.run_id for note in paid.record.maybe_paid] == ["one"]
    assert bodies(store) == []
    assert "kept" not in document(store, client) or not document(store, client)["kept"]


def test_a_refresh_that_is_refused_gives_up_nothing(store, client, server: HostileServer):
    """What costs nothing changes nothing: the kept answer still stands."""
    refused(store, client, "one")
    server.play(REFUSED)
    with pytest.raises(InvalidRequestError):
        pay(store, client, "two", not_before=datetime.now(UTC))
    assert sends(server) == 1
    refused(store, client, "three")
    assert sends(server) == 1


def test_a_record_outlives_a_refresh_whose_answer_can_not_be_read(store, client, server: HostileServer):
    """Others go on using the old images; a refresh of the same run reads its own answer and sends nothing."""
    server.play(answer(200, answered(png())))
    old = pay(store, client, "one")
    start = datetime.now(UTC)
    server.play(PAGE)
    for _ in range(2):
        with pytest.raises(InvalidResponseError):
            pay(store, client, "two", not_before=start)
    assert pay(store, client, "three").generation == old.generation
    assert sends(server) == 1


def test_who_opted_in_reads_it_before_sending(store, client, server: HostileServer, caplog):
    """With retry_unknown_outcome the kept answer is tried first, and sent again where it still can't be read."""
    server.play(linked(server), answer(503), answer(200, png()))
    refused(store, client, "one", DownloadError)
    assert not pay(store, client, opted_in(store, client, "one")).sent
    assert sends(server) == 1

    other = store.model_copy(update={"url": f"{store.url}-2"})
    server.play(PAGE, PAGE, answer(200, answered(png())))
    refused(other, client, "one")
    refused(other, client, opted_in(other, client, "one"))
    assert len(bodies(other)) == 2
    paid = pay(other, client, opted_in(other, client, "one"))
    assert paid.sent
    assert len(paid.record.maybe_paid) == 2
    assert "is sent again as a decision of this run" in caplog.text
    assert bodies(other) == []
    assert sends(server) == 3


def test_what_was_cut_off_is_kept_and_a_new_run_decides_anew(store, client, server: HostileServer):
    """Half an image will never be a whole one: it is kept, but only the run that sent it is kept from sending."""
    server.play(cut(answered(png()), 60), answer(200, answered(png())))
    refused(store, client, "one", UnknownOutcomeError)
    assert len(bodies(store)) == 1
    assert refused(store, client, "one", UnknownOutcomeError).attempts == 0
    assert sends(server) == 1
    assert pay(store, client, "two").sent
    assert bodies(store) == []


def test_a_failure_that_is_told_is_sent_again_by_a_new_run(store, client, server: HostileServer):
    """It has no images, whoever reads it; but a ticket for images to come is no failure, and may be paid."""
    failed = answer(200, {"status": "FAILED", "message": "queue timeout", "data": None})
    server.play(failed, answer(200, answered(png())))
    assert "where that is in vain, sends the request anew" in str(refused(store, client, "one"))
    assert refused(store, client, "one").attempts == 0
    paid = pay(store, client, "two")
    assert paid.sent
    assert [note.run_id for note in paid.record.maybe_paid] == ["one"]
    assert (bodies(store), sends(server)) == ([], 2)

    ticket = {"status": "PENDING", "jobId": "1f", "message": "success"}
    server.play(answer(200, ticket))
    other = store.model_copy(update={"url": f"{store.url}-2"})
    for run in ("one", "two"):
        refused(other, client, run)
    assert sends(server) == 1


def test_where_the_store_fails_the_rescue_folder_keeps_it(store, client, server: HostileServer, tmp_path):
    """The error says where; the next run with this folder brings it into the store, and reads it from there."""
    store.check_once()
    (obstacle := Path(store.url) / "answers").touch()
    server.play(linked(server), answer(503), answer(503), answer(200, png()))
    error = refused(store, client, "one", DownloadError)
    folder = RescueFolder(store, client.api_origin, logging.getLogger()).folder(HASH)
    assert f"in {folder}: the next run with this rescue folder takes it from there" in str(error)
    assert len(rescued(tmp_path)) == 2
    obstacle.unlink()

    error = refused(store, client, "two", DownloadError)
    assert error.attempts == 0
    (key,) = bodies(store)
    assert f"it is kept at {store.uri(key)}" in str(error)
    assert rescued(tmp_path) == []
    paid = pay(store, client, "three")
    assert not paid.sent
    assert (paid.record.run_id, paid.record.maybe_paid) == ("one", ())
    assert sends(server) == 1


def test_the_rescue_folder_takes_more_than_one(store, client, server: HostileServer, tmp_path):
    """A refresh whose answer can't be read either loses nothing, be it images or an answer that waits there."""
    store.check_once()
    obstacles = [Path(store.url) / name for name in ("answers", "images")]
    for obstacle in obstacles:
        obstacle.touch()
    server.play(answer(200, answered(png())), PAGE, PAGE)
    with pytest.raises(NotStoredError):
        pay(store, client, "one")
    for run in ("two", "three"):
        with pytest.raises(InvalidResponseError):
            pay(store, client, run, not_before=datetime.now(UTC))
    assert len(rescued(tmp_path)) == 4
    for obstacle in obstacles:
        obstacle.unlink()

    rescue = RescueFolder(store, client.api_origin, logging.getLogger())
    there = rescue.take(HASH)
    assert there is not None
    assert there.read is not None
    assert [hand.answer.run_id for hand in there.unread] == ["two", "three"]
    assert [image.read_bytes() for image in pay(store, client, "four").fresh] == [png()]
    assert rescued(tmp_path) == []
    assert sends(server) == 3


def test_whoever_lost_the_claim_leaves_the_answer_in_the_rescue_folder(
    store, client, server: HostileServer, tmp_path
):
    """Who took the claim over may be paying by now: their document is not written over."""
    late = Ledger(store, client.api_origin, "late", ttl=0.05)
    taken: list[Claim] = []

    def page(wire: Wire) -> bool:
        store.remove(late.documents.key(HASH))
        taken.append(acquire(Ledger(store, client.api_origin, "taker"), HASH))
        return PAGE(wire)

    server.play(page)
    error = refused(store, client, late)
    assert "somebody else holds the claim" in str(error)
    assert len(rescued(tmp_path)) == 2
    assert document(store, client)["holder"]["run_id"] == "taker"
    taken[0].release()
    assert refused(store, client, "three").attempts == 0
    assert rescued(tmp_path) == []
    assert sends(server) == 1


def test_whoever_is_interrupted_keeps_the_url_at_once(store, client, server: HostileServer, tmp_path):
    """However patient the store is, a stop ends the wait for an image host, and the answer is safe."""
    stop = Stop()
    patient = store.model_copy(update={"patience": 60})

    def down(wire: Wire) -> bool:
        stop.cancel("interrupted")
        return answer(503)(wire)

    server.play(linked(server), down, answer(200, png()))
    with pytest.raises(DownloadError):
        pay(patient, client, "one", limits=Limits(stop))
    assert len(bodies(store)) == 1
    assert not pay(store, client, "two").sent


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_is_killed_while_fetching_keeps_the_url(
    store, client, server: HostileServer, tmp_path, stream: bool
):
    """SIGKILL while an image host is slow does not cost the image: the next run on this machine fetches it."""
    folders = {Path(store.url): tmp_path / "one", tmp_path / "rescue": tmp_path / "two"}

    def kill(wire: Wire) -> bool:
        for folder, as_it_was in folders.items():
            shutil.copytree(folder, as_it_was)
        return answer(200, png())(wire)

    server.play(as_events(server) if stream else linked(server), kill)
    request = REQUEST.model_copy(update={"stream": stream})
    assert engine_of(store, client, "one").generate(request).sent
    assert (rescued(tmp_path), bodies(store)) == ([], [])
    for folder, as_it_was in folders.items():
        shutil.rmtree(folder)
        as_it_was.rename(folder)

    server.play(answer(200, png()))
    paid = engine_of(store, client, "two").generate(request)
    assert not paid.sent
    assert [image.read_bytes() for image in paid.fresh] == [png()]
    assert (paid.record.run_id, paid.record.maybe_paid, paid.record.also_paid) == ("one", (), ())
    assert (rescued(tmp_path), bodies(store)) == ([], [])
    assert sends(server) == 0  # since the kill


def test_what_waits_beside_it_stays(store, client, server: HostileServer, tmp_path):
    """An answer that is kept while its images are fetched does not touch an older one, nor one that is damaged."""
    store.check_once()
    (obstacle := Path(store.url) / "answers").touch()
    server.play(PAGE)
    refused(store, client, "one")
    before = rescued(tmp_path)
    obstacle.unlink()
    server.play(linked(server), answer(200, png()))
    assert pay(store, client, "two", not_before=datetime.now(UTC)).sent
    assert rescued(tmp_path) == before
    for path in before:
        path.write_bytes(b"damaged")
    server.play(linked(server), answer(200, png()))
    assert pay(store, client, "three", not_before=datetime.now(UTC)).sent
    assert {path: path.read_bytes() for path in rescued(tmp_path)} == dict.fromkeys(before, b"damaged")


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_is_cut_off_while_fetching_keeps_the_url(store, client, server: HostileServer, stream: bool):
    """Ctrl-C, or SIGTERM as Prefect raises it, does not cost the image: the next run fetches it."""

    def interrupt(wire: Wire) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        wire.wait(5)
        return False

    server.play(as_events(server) if stream else linked(server), interrupt, answer(200, png()))
    request = REQUEST.model_copy(update={"stream": stream})
    with pytest.raises(KeyboardInterrupt):
        engine_of(store, client, "one").generate(request)
    assert not engine_of(store, client, "one").generate(request).sent
    assert sends(server) == 1


def test_many_who_read_it_at_once_record_it_once(store, client, server: HostileServer):
    """Eight runs have one record with one payment, and nothing was sent."""
    server.play(linked(server), answer(503), answer(200, png()))
    refused(store, client, "one", DownloadError)
    with ThreadPoolExecutor(8) as threads:
        paid = list(threads.map(lambda number: pay(store, client, f"run-{number}"), range(8)))
    assert not any(one.sent for one in paid)
    assert len({one.generation.model_dump_json() for one in paid}) == 1
    assert paid[0].record.maybe_paid == paid[0].record.also_paid == ()
    assert (bodies(store), sends(server)) == ([], 1)


def in_part(server: HostileServer) -> Behaviour:
    """An answer with an image, and the URLs of two more on the same server."""
    urls = [{"url": f"{server.url}/{number}.png"} for number in range(2)]
    return answer(200, {"data": [{"b64_json": base64.b64encode(png()).decode()}, *urls]})


TWINS = ImageRequest(prompt="three sealed letters", model="gpt-image-1", n=3)
HASH_OF_TWINS = TWINS.request_hash


def had(store: ImageStore, client: TTAPIClient, run: str, **options: Any) -> int:
    paid = engine_of(store, client, run, **options).generate(TWINS)
    assert not store.missing(paid.generation.images)
    return len(paid.generation.images)


def test_urls_that_were_down_beside_images_are_fetched_by_the_next_run(
    each_store: ImageStore, client, server: HostileServer, tmp_path
):
    """What was had counts at once; the URLs are kept with the answer until all of them are had, and cost nothing."""
    store, fine, down = impatient(each_store, tmp_path), answer(200, png()), answer(503)
    server.play(in_part(server), down, down, down, fine, down, fine)
    counts = [had(store, client, run) for run in ("one", "two", "three")]
    assert counts == [1, 2, 2]
    assert len(bodies(store)) == 1
    assert had(store, client, "four") == 3
    assert bodies(store) == []
    assert had(store, client, "five") == 3
    assert sends(server) == 1
    # each is fetched until it is had, and no longer: its address may be of no use by then
    fetched = [request.path for request in server.requests if request.method == "GET"]
    assert fetched == [f"/{number}.png" for number in (0, 1, 0, 1, 0, 0)]


def test_a_process_that_ends_while_it_has_the_rest_is_in_nobodys_way(
    store, client, server: HostileServer, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    """Its claim is taken over, whether its end shows from here or it was on another machine, and costs no note."""
    server.play(in_part(server), answer(503), answer(503))
    assert had(store, client, "one") == 1
    left = Ledger(store, client.api_origin, "left").claim_rest(HASH_OF_TWINS)
    assert left is not None
    assert had(store, client, "alive") == 1  # the other one is at it
    assert sends(server) == 1
    leases.live.pop(left.token)
    server.play(answer(200, png()), answer(503))
    assert had(store, client, "two") == 2

    assert Ledger(store, client.api_origin, "left").claim_rest(HASH_OF_TWINS) is not None
    elsewhere = leases.this_process("x").model_copy(update={"place": "another boot"})
    monkeypatch.setattr(
        leases, "this_process", lambda run_id: elsewhere.model_copy(update={"run_id": run_id})
    )
    server.play(answer(200, png()))
    paid = engine_of(store, client, "three").generate(TWINS)
    assert [image.index for image in paid.generation.images] == [0, 1, 2]
    assert (paid.record.maybe_paid, paid.record.also_paid) == ((), ())
    assert bodies(store) == []
    assert sends(server) == 0


def test_whoever_had_the_rest_and_ended_has_sent_nothing(store, client, server: HostileServer):
    """A refresh that takes such a claim over notes no payment that nobody made."""
    server.play(in_part(server), answer(503), answer(503))
    assert had(store, client, "one") == 1
    assert Ledger(store, client.api_origin, "left").claim_rest(HASH_OF_TWINS) is not None
    server.play(answer(200, answered(png())))
    paid = engine_of(store, client, "two", not_before=datetime.now(UTC)).generate(TWINS)
    assert paid.sent
    assert paid.record.maybe_paid == ()


def test_the_rest_of_an_answer_waits_in_the_rescue_folder(store, client, server: HostileServer, tmp_path):
    """With the images that were had; who brings them into the store brings the URLs, too."""
    store.check_once()
    (obstacle := Path(store.url) / "images").touch()
    server.play(in_part(server), answer(503), answer(503), answer(200, png()))
    with pytest.raises(NotStoredError):
        had(store, client, "one")
    obstacle.unlink()
    assert had(store, client, "two") == 1
    assert rescued(tmp_path) == []
    assert had(store, client, "three") == 3
    assert sends(server) == 1


def test_what_could_not_be_fetched_counts_as_spent(store, client, server: HostileServer):
    """All of the answer is paid; having the rest of it costs nothing more."""
    server.play(in_part(server), answer(503), answer(503), answer(200, png()))
    spent = []
    for run in ("one", "two"):
        spending = Spending(Budget(images=3))
        assert spending.reserve(TWINS) is None
        had(store, client, run, limits=Limits(spending=spending))
        spent.append((spending.spent.images, spending.reserved))
    assert spent == [(3, 0), (0, 0)]


def test_many_who_want_the_rest_have_it_once(store, client, server: HostileServer):
    """Nobody waits for it, and nobody pays."""
    server.play(in_part(server), answer(503), answer(503), answer(200, png()))
    assert had(store, client, "one") == 1
    with ThreadPoolExecutor(8) as threads:
        counts = set(threads.map(lambda number: had(store, client, f"run-{number}"), range(8)))
    assert counts <= {1, 3}
    assert had(store, client, "last") == 3
    assert (bodies(store), sends(server)) == ([], 1)


def test_the_rest_of_a_streamed_answer_is_kept(store, client, server: HostileServer):
    """A stream's image counts at once, and its URL is tried again."""
    events = [{"b64_json": base64.b64encode(png()).decode()}, {"url": f"{server.url}/x.png"}]
    body = "".join(
        f"data: {json.dumps({'type': 'image_generation.completed', **event})}\n\n" for event in events
    )
    streamed = answer(200, body.encode(), {"Content-Type": "text/event-stream"})
    server.play(streamed, answer(503), answer(200, png()))
    request = TWINS.model_copy(update={"stream": True})
    counts = [
        len(engine_of(store, client, run).generate(request).generation.images) for run in ("one", "two")
    ]
    assert (counts, sends(server)) == ([1, 2], 1)


def test_a_refresh_gives_the_rest_up(store, client, server: HostileServer):
    """Who pays anew has a whole answer: nothing is left of the old one."""
    server.play(in_part(server), answer(503), answer(503), answer(200, answered(png())))
    assert had(store, client, "one") == 1
    assert had(store, client, "two", not_before=datetime.now(UTC)) == 1
    assert (bodies(store), sends(server)) == ([], 2)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_kept_answer_that_is_lost_still_keeps_from_paying(
    store, client, server: HostileServer, damage: str
):
    """What was paid for is for people to give up, also where its body is gone or is not what came."""
    refused(store, client, "one")
    (key,) = bodies(store)
    if damage == "gone":
        store.remove(key)
    else:
        store.write(key, b"something else", "text/plain")
    error = refused(store, client, "two")
    assert ("there is no" if damage == "gone" else "its body is damaged") in error.message
    assert sends(server) == 1


def test_an_older_version_does_not_pay_anew(store, client):
    """Only documents with a kept answer have a format that versions without this knowledge refuse."""
    refused(store, client, "one")
    assert document(store, client)["format"] == 2
    with pytest.raises(InvalidResponseError):
        pay(store, client, "two")
    assert document(store, client)["format"] == 2


def test_its_row_says_where_it_is_and_reading_it_costs_nothing(store, client, server: HostileServer):
    """A batch counts the first send, nothing for a later look, and shows the image as one that was paid for before."""
    server.play(linked(server), answer(503), answer(503), answer(200, png()))
    outcomes = []
    for run in ("one", "two", "three"):
        spending = Spending(Budget(images=1))
        assert spending.reserve(REQUEST) is None
        engine = engine_of(store, client, run, limits=Limits(spending=spending))
        done = Work(engine, BatchOptions(), None).outcome(Item(0, REQUEST), None)
        assert isinstance(done, Done)
        assert spending.reserved == 0
        outcomes.append((done.row.status, done.row.api_calls, done.images_paid, spending.spent.images))
        if done.row.status == "failed":
            assert bodies(store)[0] in done.row.error
            assert done.row.error_type == "DownloadError"
    assert outcomes == [("failed", 1, 1, 1), ("failed", 0, 0, 0), ("cached", 0, 0, 0)]
    assert len(done.row.images) == 1
