"""What is paid for is never lost: a store that fails after the answer, and the run that comes next."""

from __future__ import annotations

import logging
import os
import signal
import stat
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.errors import NotStoredError, StoreError, UnknownOutcomeError
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.generation.persisting import Keeper, Paid
from prefect_ttapi.generation.rescue import Read, RescueFolder, rescue_place
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import engine_of
from tests.support.ledgers import acquire, recorded
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server

REQUEST = ImageRequest(prompt="a lifeboat", model="gpt-image-1", n=2)
HASH = REQUEST.request_hash


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """A store with no patience, and a rescue folder of its own."""
    return ImageStore(url=str(tmp_path / "store"), patience=0, rescue_folder=str(tmp_path / "rescue"))


def pay(store: ImageStore, client: TTAPIClient, run: str, **options: object) -> Paid:
    return engine_of(store, client, run, **options).generate(REQUEST)


def kept(tmp_path: Path) -> list[Path]:
    """The files in the rescue folder."""
    return [path for path in (tmp_path / "rescue").rglob("*") if path.is_file()]


def in_the_way(store: ImageStore) -> Path:
    """A file where the store's folder of images should be."""
    store.check_once()
    (images := Path(store.url) / "images").touch()
    return images


def lost(store: ImageStore, client: TTAPIClient, run: str = "one") -> str:
    """Pay, and have it not stored; what the error says. Afterwards the store is in order again."""
    obstacle = in_the_way(store)
    with pytest.raises(NotStoredError) as error:
        pay(store, client, run)
    obstacle.unlink()
    return str(error.value)


@pytest.mark.parametrize("run", ["one", "two"], ids=["a retry of the run", "another run"])
def test_the_next_run_takes_it_from_the_rescue_folder(
    store, client, sandbox: Sandbox, tmp_path, caplog, run: str
):
    """The error says where the images are; who asks next, the same run too, stores them and sends nothing."""
    caplog.set_level(logging.INFO, "prefect_ttapi")
    folder = RescueFolder(store, "sandbox", logging.getLogger()).folder(HASH)
    assert f"in {folder}: the next run with this rescue folder takes it from there" in lost(store, client)
    assert len(kept(tmp_path)) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.parents[:2])} == {0o700}

    paid = pay(store, client, run, result_key="mine")
    assert not paid.sent
    assert [image.sha256 for image in paid.fresh] == [image.sha256 for image in paid.generation.images]
    assert (paid.record.run_id, paid.record.result_key) == ("one", "mine")
    assert paid.record.maybe_paid == paid.record.also_paid == ()
    assert kept(tmp_path) == []
    assert "its images were in the rescue folder: stored now, and nothing was sent" in caplog.text
    assert pay(store, client, "three").generation == paid.generation
    assert sandbox.calls == 1


def test_other_machines_hear_where_it_is(store, client, sandbox: Sandbox, tmp_path, caplog):
    """Who can't see the rescue folder may send again as its own decision, and its log says where the images are."""
    lost(store, client)
    elsewhere = store.model_copy(update={"rescue_folder": str(tmp_path / "other")})
    with pytest.raises(UnknownOutcomeError, match=r"paid for, not stored; kept on .* in .*/rescue/"):
        pay(elsewhere, client, "one")
    paid = pay(elsewhere, client, "two")
    assert "may already have been paid for by run one (unknown: paid for, not stored; kept on" in caplog.text
    assert [note.run_id for note in paid.record.maybe_paid] == ["one"]
    assert sandbox.calls == 2


def test_an_outage_within_the_patience_is_one_warning(
    s3_server: S3Server, client, sandbox: Sandbox, tmp_path, caplog
):
    """Silence and refusals are tried again, with the images safe meanwhile; then nothing is left of them."""
    troubles = iter([403, 503, "swallow", 507, 403])
    safe = []

    def meddle(method: str, path: str, headers: dict[str, str]) -> str | int | None:
        if method != "PUT" or "/images/" not in path:
            return None
        trouble = next(troubles, None)
        safe.append(len(kept(tmp_path)))
        return trouble

    with meddling_proxy(s3_server.url, meddle) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url, rescue_folder=str(tmp_path / "rescue"))
        assert pay(ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings), client, "one").sent
    assert safe[0] == 0
    assert set(safe[1:]) == {3}
    assert kept(tmp_path) == []
    assert [record.message for record in caplog.records if "not stored yet" in record.message] == [
        record.message for record in caplog.records if record.levelno >= logging.WARNING
    ]
    assert caplog.text.count("is paid for, but not stored yet") == 1
    assert sandbox.calls == 1


def test_an_interruption_while_storing_loses_nothing(s3_server: S3Server, client, sandbox: Sandbox, tmp_path):
    """Ctrl-C between the answer and the store: the images are in the rescue folder when it leaves."""
    presses = iter([True])

    def press(method: str, path: str, headers: dict[str, str]) -> None:
        if method == "PUT" and "/images/" in path and next(presses, False):
            os.kill(os.getpid(), signal.SIGINT)

    with meddling_proxy(s3_server.url, press) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url, rescue_folder=str(tmp_path / "rescue"))
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings)
        with pytest.raises(KeyboardInterrupt):
            pay(store, client, "one")
        assert len(kept(tmp_path)) == 3
        assert not pay(store, client, "one").sent
    assert sandbox.calls == 1


def test_where_nothing_can_be_written_any_longer_the_error_says_so(store, client, tmp_path):
    """With a rescue folder that is no good either by now, the run knows that the images are gone."""
    rescue_place(store.rescue_folder).rmdir()
    (tmp_path / "rescue").touch()
    obstacle = in_the_way(store)
    with pytest.raises(NotStoredError, match="nor could it be kept on this machine: can't make"):
        pay(store, client, "one")
    assert obstacle.is_file()


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose own rescue folder can't be written; where their temporary folder is."""
    (tmp_path / "state").touch()
    (temporary := tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary


def test_a_rescue_folder_that_can_not_be_written_is_told_before_paying(
    store, client, sandbox: Sandbox, tmp_path
):
    """The folder that the store names is the one that counts: nothing is sent where it can't be written."""
    (tmp_path / "rescue").touch()
    with pytest.raises(
        StoreError, match=r"nothing is sent: .*/rescue: File exists.*set the store's rescue_folder"
    ):
        pay(store, client, "one")
    assert sandbox.calls == 0
    (tmp_path / "rescue").unlink()
    assert pay(store, client, "one").sent


def test_without_a_home_the_temporary_folder_takes_its_place(
    store, client, sandbox: Sandbox, homeless: Path, tmp_path, caplog
):
    """A warning says so; what is kept there is found again, also once the user's own folder can be written."""
    store = store.model_copy(update={"rescue_folder": None})
    assert f"in {homeless}/prefect-ttapi-{os.geteuid()}/" in lost(store, client)
    assert caplog.text.count("the rescue folder can't be written") == 1
    (tmp_path / "state").unlink()
    assert not pay(store, client, "two").sent
    assert sandbox.calls == 1


def test_a_folder_that_can_not_be_looked_into_hides_no_other(
    store, client, sandbox: Sandbox, homeless: Path, monkeypatch, caplog
):
    """What is kept in the temporary folder is found, though the user's own folder can't even be asked for."""
    monkeypatch.setenv("XDG_STATE_HOME", f"/{'x' * 300}")
    store = store.model_copy(update={"rescue_folder": None})
    assert f"in {homeless}/prefect-ttapi-{os.geteuid()}/" in lost(store, client)
    assert "is not looked for: " in caplog.text
    assert not pay(store, client, "two").sent
    assert sandbox.calls == 1
    assert not any(path.is_file() for path in homeless.rglob("*"))


def test_a_temporary_folder_of_somebody_else_is_no_rescue_folder(
    store, client, sandbox: Sandbox, homeless: Path
):
    """Where others could put what they like, nothing is kept, nothing is looked for, and nothing is sent."""
    store = store.model_copy(update={"rescue_folder": None})
    (homeless / f"prefect-ttapi-{os.geteuid()}").mkdir()
    (homeless / f"prefect-ttapi-{os.geteuid()}").chmod(0o777)
    with pytest.raises(StoreError, match=r"nothing is sent: .*others may write to it"):
        pay(store, client, "one")
    assert sandbox.calls == 0


@pytest.mark.parametrize("images_before", [0, 1], ids=["before the answer", "while it is stored"])
def test_whoever_is_interrupted_keeps_it_before_a_store_that_hangs(
    s3_server: S3Server, client, sandbox: Sandbox, tmp_path, images_before: int
):
    """An answer that nobody may wait for any longer is on this machine before the store is asked to take the rest."""
    before_upload: list[int] = []

    def look(method: str, path: str, _headers: dict[str, str]) -> None:
        if method == "PUT" and "/images/" in path:
            before_upload.append(len(kept(tmp_path)))

    class Interrupted(Stop):
        """Set once the API was called, and so many images are stored."""

        @property
        def reason(self) -> str | None:
            return "interrupted" if sandbox.calls and len(before_upload) >= images_before else None

        @reason.setter
        def reason(self, _: str | None) -> None:
            pass

    with meddling_proxy(s3_server.url, look) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url, rescue_folder=str(tmp_path / "rescue"))
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings)
        assert pay(store, client, "one", limits=Limits(Interrupted())).sent
    assert before_upload == [0, 3] if images_before else [3, 3]
    assert kept(tmp_path) == []


def test_without_a_rescue_folder_what_the_store_takes_in_the_end_is_a_success(
    store, client, sandbox: Sandbox, tmp_path
):
    """Where this machine has no place for it any longer, it is stored all the same once the store is up again."""
    rescue_place(store.rescue_folder).rmdir()
    (tmp_path / "rescue").touch()
    obstacle = in_the_way(store)
    with ThreadPoolExecutor(1) as threads:
        paying = threads.submit(pay, store.model_copy(update={"patience": 20}), client, "one")
        while not sandbox.calls:
            time.sleep(0.01)
        time.sleep(0.3)
        obstacle.unlink()
        assert paying.result().sent
    assert sandbox.calls == 1


def test_what_can_not_be_read_now_is_not_paid_for_again(store, client, sandbox: Sandbox, tmp_path):
    """While the rescue folder has the answer but fails, nothing is sent; later it is taken."""
    lost(store, client)
    document = next((tmp_path / "rescue").rglob("*.json"))
    hidden = document.rename(document.with_suffix(".away"))
    document.mkdir()
    with pytest.raises(StoreError, match=r"and can't be read: can't read .*: Is a directory"):
        pay(store, client, "two")
    document.rmdir()
    hidden.rename(document)
    assert not pay(store, client, "two").sent
    assert sandbox.calls == 1


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def change_a_pixel(folder: Path) -> None:
    path = next((folder / "images").iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_an_image(folder: Path) -> None:
    next((folder / "images").iterdir()).unlink()


def write_nonsense(folder: Path) -> None:
    next(folder.rglob("*.json")).write_text('{"format": 1, "state": "generated"}')


def be_somebody_elses(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.symlink_to("moved")


@pytest.mark.parametrize(
    "damage",
    [open_to_all, change_a_pixel, lose_an_image, write_nonsense, be_somebody_elses],
    ids=lambda d: d.__name__,
)
def test_damaged_answers_are_passed_over(
    store, client, sandbox: Sandbox, tmp_path, caplog, damage: Callable[[Path], None]
):
    """What is not surely the paid answer is ignored, with a warning: the run that paid does not pay again by itself."""
    lost(store, client)
    damage(folder := RescueFolder(store, "sandbox", logging.getLogger()).folder(HASH))
    with pytest.raises(UnknownOutcomeError):
        pay(store, client, "one")
    assert f"{folder} is passed over: " in caplog.text
    assert sandbox.calls == 1
    assert pay(store, client, "two").sent


def test_other_stores_and_apis_find_nothing(store, client, sandbox: Sandbox, tmp_path):
    """One rescue folder serves all: each store and each API finds its own."""
    lost(store, client)
    other = ImageStore(url=str(tmp_path / "other"), rescue_folder=store.rescue_folder)
    assert pay(other, client, "two").sent
    real = RescueFolder(store, "https://api.ttapi.io", logging.getLogger())
    assert not real.holds(HASH)
    assert real.take(HASH) is None
    assert not pay(store, client, "two").sent
    assert sandbox.calls == 2


def test_a_refresh_passes_over_what_is_too_old(store, client, sandbox: Sandbox, tmp_path):
    """A rescued answer from before the refreshing run does not count for it, and stays where it is."""
    lost(store, client)
    assert pay(store, client, "two", not_before=datetime.now(UTC)).sent
    assert len(kept(tmp_path)) == 3
    assert sandbox.calls == 2


def test_many_who_share_the_folder_record_it_once(store, client, sandbox: Sandbox, tmp_path):
    """Eight that find the same answer at the same moment have one record, with one payment in it."""
    lost(store, client)
    with ThreadPoolExecutor(8) as threads:
        paid = list(threads.map(lambda number: pay(store, client, f"run-{number}"), range(8)))
    assert not any(one.sent for one in paid)
    assert len({one.generation.model_dump_json() for one in paid}) == 1
    assert paid[0].record.maybe_paid == paid[0].record.also_paid == ()
    assert kept(tmp_path) == []
    assert sandbox.calls == 1


def test_its_payer_may_come_back(store, client, sandbox: Sandbox):
    """Whoever takes the answer of a holder that was cut off records that one's payment, once, whoever comes first."""
    ledger = Ledger(store, "sandbox", "cut-off")
    late = acquire(ledger, HASH)
    assert isinstance(late, Claim)
    late.before_sending()
    generation = pay(store.model_copy(update={"url": f"{store.url}-2"}), client, "x").generation
    answer = late.answer(generation)
    images = [Path(image.uri.removeprefix("file://")) for image in generation.images]
    (Path(store.url) / "images").mkdir()
    for image in images:
        (Path(store.url) / "images" / image.name).write_bytes(image.read_bytes())
    late.mark_unknown("cut off")
    with Ledger(store, "sandbox", "next").try_acquire(HASH, has_answer=True) as claim:
        assert [note.run_id for note in claim.maybe_paid] == ["cut-off"]
        record = claim.record_answer(answer.model_copy(update={"result_key": "another"}))
    assert late.record_answer(answer).generation == record.generation
    final = ledger.look_up(HASH)
    assert final is not None
    assert (final.run_id, final.maybe_paid, final.also_paid) == ("cut-off", (), ())


def test_what_is_stored_already_is_forgotten(store, client, tmp_path):
    """An answer whose record was written, but that stayed in the folder, goes at the next hit."""
    paid = pay(store, client, "one")
    rescue = RescueFolder(store, "sandbox", logging.getLogger())
    claim = Ledger(store, "sandbox", "one").try_acquire("0" * 64)
    assert isinstance(claim, Claim)
    rescue.put(HASH, Read(claim.answer(paid.generation), paid.fresh))
    assert not pay(store, client, "two").sent
    assert kept(tmp_path) == []


def test_images_of_a_record_that_was_first_are_not_those_of_the_folder(store, client, sandbox: Sandbox):
    """Where an answer is recorded while one from the folder is being stored, its own images count."""
    late, kept_here = (
        engine_of(store, client, "one").generate(ImageRequest(prompt=prompt, model="gpt-image-1", n=2))
        for prompt in ("a buoy", "a raft")
    )
    first = Ledger(store, "sandbox", "one", ttl=0.1).try_acquire(HASH)
    assert isinstance(first, Claim)
    second = acquire(Ledger(store, "sandbox", "two"), HASH)  # once the first is silent for its time
    assert isinstance(second, Claim)
    ours = {"request": REQUEST, "request_hash": HASH}
    keeper = Keeper(store, "sandbox", logging.getLogger())
    keeper.rescue.put(
        HASH, Read(second.answer(kept_here.generation.model_copy(update=ours)), kept_here.fresh)
    )
    recorded(first, late.generation.model_copy(update=ours))

    taken = keeper.take_back(second, None)
    assert taken is not None
    assert taken.generation.images == late.generation.images != kept_here.generation.images
    assert taken.fresh == ()
