"""What `verify` finds in a store, and what it puts right."""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from prefect_ttapi.cli.checks import verify
from prefect_ttapi.cli.findings import Finding, Kind
from prefect_ttapi.cli.main import main
from prefect_ttapi.cli.reporting import Progress
from prefect_ttapi.cli.verify import repair
from prefect_ttapi.errors import StoreError
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.results import DeliveredImage
from prefect_ttapi.storage.objects import Condition, Facts
from prefect_ttapi.storage.store import ImageStore
from tests.support.damaged_stores import age, claimed, image_key, kept, manifest, paid, record_key, unknown
from tests.support.generations import API, fresh_image, request_of
from tests.support.ledgers import acquire
from tests.support.meddling import meddling_proxy
from tests.support.quirks import quirky_server
from tests.support.rows import manifest_of
from tests.support.s3 import S3Server


@pytest.fixture
def store(each_store: ImageStore) -> ImageStore:
    """The test runs on each kind of store."""
    return each_store


def found_in(store: ImageStore, **options: bool) -> dict[Kind, set[str]]:
    """Keys of images and records by kind."""
    found: dict[Kind, set[str]] = {}
    for finding in verify(store, **options):
        key = finding.uri.removeprefix(store.uri("x").removesuffix("x"))
        found.setdefault(finding.kind, set()).add(key)
    return found


def mend(store: ImageStore, **options: bool) -> list[tuple[Finding, str, bool]]:
    done = ((finding, repair(store, finding, **options)) for finding in verify(store) if finding.wrong)
    return [(finding, step.line, step.done) for finding, step in done]


def overwrite(store: ImageStore, key: str, data: bytes) -> None:
    store.write(key, data, "image/png")


def test_a_store_in_order_is_found_in_order(store: ImageStore) -> None:
    """Records, their images and manifests in order, released claims and outcomes of today: nothing is wrong."""
    manifest(store, paid(store, "one"), paid(store, "two", "three"))
    claimed(store, "given back").release()
    unknown(store, "timed out")
    assert found_in(store) == {Kind.UNKNOWN_OUTCOME: {record_key("timed out")}}


def test_each_thing_wrong_is_found_where_it_is(store: ImageStore) -> None:
    """Lost, cut, damaged and unnamed images and a claim without holder are each found, and nothing else."""
    good, lost, cut, damaged = [paid(store, prompt) for prompt in ("good", "lost", "cut", "damaged")]
    store.remove(image_key(lost))
    overwrite(store, image_key(cut), b"cu")
    overwrite(store, image_key(damaged), b"dimaged")
    orphan = store.put_image(fresh_image(b"nobody's"), {})
    stands = claimed(store, "claimed", ttl=0.2)
    store.write("images/notes.txt", b"", "text/plain")
    key = manifest(store, good, lost)
    assert found_in(store) == {
        Kind.MISSING: {record_key("lost")},
        Kind.WRONG_SIZE: {record_key("cut")},
        Kind.DAMAGED: {image_key(damaged), image_key(cut)},
        Kind.DEAD_CLAIM: {record_key("claimed")},
        Kind.PAST: {key},
        Kind.STRAY: {"images/notes.txt"},
    }
    stands.release()
    assert found_in(store)[Kind.ORPHAN] == {store.objects.key(orphan.uri)}
    assert Kind.DAMAGED not in found_in(store, quick=True)


def test_what_is_put_right_is_in_order_and_paid_for_anew(store: ImageStore) -> None:
    """After a repair nothing is wrong, lost images count as never generated, and what was paid stays noted."""
    lost, damaged = paid(store, "lost", "twin"), paid(store, "damaged")
    store.remove(image_key(lost))
    overwrite(store, image_key(damaged), b"dimaged")
    dead = claimed(store, "dead", ttl=0.1)
    steps = mend(store)
    assert {finding.kind for finding, _, _ in steps} == {Kind.MISSING, Kind.DAMAGED, Kind.DEAD_CLAIM}
    assert all(done for _, _, done in steps)
    assert set(found_in(store)) == {Kind.UNKNOWN_OUTCOME}
    del dead
    again = paid(store, "damaged")
    assert store.read_bytes(again.images[0].uri) == b"damaged"
    record = Ledger(store, API, "reader").look_up(request_of("damaged").request_hash)
    assert record is not None
    assert [note.run_id for note in record.also_paid] == ["run of damaged"]


def test_answers_that_can_not_be_read_are_told_and_given_up(store: ImageStore) -> None:
    """Each is told with place and reason; a repair lets the next run pay anew, and leaves the body to be looked at."""
    key = kept(store, "sealed")
    (finding,) = verify(store)
    assert (finding.kind, finding.wrong, finding.records) == (Kind.KEPT, True, (record_key("sealed"),))
    assert "paid for by run run of sealed" in finding.message
    assert finding.message.endswith(f"the body is not JSON; kept at {key}")
    ledger = Ledger(store, API, "next")
    claim = acquire(ledger, request_of("sealed").request_hash)
    assert ledger.keeps_from_sending(claim)
    assert "somebody is at work on it" in repair(store, finding).line
    claim.release()

    assert repair(store, finding).done
    assert repair(store, finding).line.startswith("left ")
    assert found_in(store) == {Kind.UNKNOWN_OUTCOME: {record_key("sealed")}}
    assert store.read(key) == b"<html>"
    claim = acquire(Ledger(store, API, "another"), request_of("sealed").request_hash)
    assert not Ledger(store, API, "another").keeps_from_sending(claim)
    assert [note.run_id for note in claim.maybe_paid] == ["run of sealed"]
    claim.release()


def test_a_kept_answer_that_is_gone_is_told(store: ImageStore) -> None:
    """The request stays blocked until somebody gives the answer up: what was paid for it is lost."""
    store.remove(kept(store, "sealed"))
    (finding,) = verify(store)
    assert finding.message.endswith("and gone or cut short by now")


def test_answers_that_no_record_names_are_orphans_after_an_hour(folder_store: ImageStore) -> None:
    """What a kill left between body and record, or a repair gave up, is deleted where that is asked for."""
    named, nobodys = kept(folder_store, "sealed"), f"answers/sandbox/{'0' * 64}/{'1' * 32}"
    for key in (nobodys, "answers/notes.txt"):
        folder_store.write(key, b"<html>", "text/plain")
    assert found_in(folder_store)[Kind.STRAY] == {"answers/notes.txt"}
    assert Kind.ORPHAN not in found_in(folder_store)
    for key in (named, nobodys):
        age(folder_store, key)
    assert found_in(folder_store)[Kind.ORPHAN] == {nobodys}
    (orphan,) = (finding for finding in verify(folder_store) if finding.kind is Kind.ORPHAN)
    assert not repair(folder_store, orphan).done
    assert repair(folder_store, orphan, delete_orphans=True).line == f"deleted {nobodys}"
    assert folder_store.read(nobodys) is None
    named_by_now = replace(orphan, images=(named,))
    assert "its record names it" in repair(folder_store, named_by_now, delete_orphans=True).line


def test_only_what_still_stands_is_put_right(store: ImageStore) -> None:
    """A record that has its images again, and a claim that was renewed, are left alone by a belated repair."""
    lost = paid(store, "lost")
    data = store.read_bytes(lost.images[0].uri)
    store.remove(image_key(lost))
    claim = claimed(store, "slow", ttl=0.1)
    findings = list(verify(store))
    overwrite(store, image_key(lost), data)
    claim.renew()
    before = {found.key: found.tag for found in store.list("ledger/api.ttapi.io/")}
    assert len(findings) == 2
    assert all(repair(store, finding).line.startswith("left ") for finding in findings)
    assert {found.key: found.tag for found in store.list("ledger/api.ttapi.io/")} == before


def test_a_living_claim_is_no_finding(store: ImageStore) -> None:
    """A claim that is renewed is not wrong, and images stored under it in this hour are no orphans yet."""
    with claimed(store, "alive", ttl=0.4) as claim:
        store.put_image(fresh_image(b"just stored"), {})
        assert found_in(store) == {}
        claim.release()
    assert set(found_in(store)) == {Kind.ORPHAN}


def test_what_is_stored_while_one_looks_is_in_order(store: ImageStore) -> None:
    """An image that is younger than the listing is looked for once more before its record is called broken."""
    store.write("images/notes.txt", b"", "text/plain")
    findings = verify(store)
    assert next(findings).kind is Kind.STRAY
    manifest(store, paid(store, "late"))
    assert list(findings) == []


def test_an_image_that_cannot_be_looked_for_is_not_called_lost(s3_server: S3Server) -> None:
    """Where the store refuses to tell, that is the finding: no record is released for it."""
    refuse = lambda method, path, _: 403 if method == "HEAD" and "/images/" in path else None  # noqa: E731
    with meddling_proxy(s3_server.url, refuse) as proxy:
        url = f"s3://{s3_server.new_bucket()}/here"
        store = ImageStore(url=url, **s3_server.settings(endpoint_url=proxy.url))
        lost = paid(store, "lost")
        store.remove(image_key(lost))
        assert found_in(store) == {Kind.UNREADABLE: {image_key(lost)}}


@pytest.mark.parametrize("document", [b"{", b"{}", b'{"format": 3}', b"\xff"])
def test_senseless_documents_are_found_and_left(store: ImageStore, document: bytes) -> None:
    """What can't be understood is wrong and never overwritten; no image is called an orphan that it may name."""
    store.put_image(fresh_image(b"perhaps named"), {})
    key = record_key("senseless")
    store.objects.write(key, fresh_image(document).open, Facts("application/json"), Condition.NOTHING)
    store.write("batches/run-1/manifest.jsonl", b"{}\n", "application/x-ndjson")
    assert found_in(store) == {Kind.SENSELESS: {key, "batches/run-1/manifest.jsonl"}}
    assert not any(done for _, _, done in mend(store, delete_orphans=True))
    assert store.read(key) == document


def test_orphans_are_deleted_only_when_asked_for_and_old(tmp_path: Path) -> None:
    """Without the option orphans stay, with it those older than an hour go, and half-written files with them."""
    store = ImageStore(url=str(tmp_path))
    old, young = [store.put_image(fresh_image(data), {}) for data in (b"old", b"young")]
    for name in (".tmp-00000000000000aa", ".tmp-00000000000000bb"):
        (tmp_path / "images" / name).write_bytes(b"half")
    age(store, store.objects.key(old.uri))
    age(store, "images/.tmp-00000000000000aa")
    assert not any(done for _, _, done in mend(store))
    assert store.size(old.uri) == 3
    assert sum(done for _, _, done in mend(store, delete_orphans=True)) == 2
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(
        [".tmp-00000000000000bb", Path(young.uri).name]
    )


def test_an_image_that_its_record_names_is_no_orphan_to_delete(tmp_path: Path) -> None:
    """Where a listing hid the record, the image leads to it, and is left."""
    store = ImageStore(url=str(tmp_path))
    made = paid(store, "hidden")
    key = image_key(made)
    mistaken = Finding(Kind.ORPHAN, made.images[0].uri, "", images=(key,), modified=0.0)
    assert repair(store, mistaken, delete_orphans=True).line == f"left {key}: {record_key('hidden')} names it"
    assert store.size(key)


def test_an_orphan_that_is_written_anew_is_left(tmp_path: Path) -> None:
    """Who stores the same image again, and has not recorded it yet, does not lose it to a repair that began before."""
    store = ImageStore(url=str(tmp_path))
    orphan = store.put_image(fresh_image(b"once more"), {})
    age(store, key := store.objects.key(orphan.uri))
    (found,) = [finding for finding in verify(store) if finding.kind is Kind.ORPHAN]
    store.put_image(fresh_image(b"once more"), {})
    assert repair(store, found, delete_orphans=True).line == f"left {key}: it was written anew meanwhile"
    assert store.size(key) == 9


def test_nothing_is_written_without_repair(tmp_path: Path) -> None:
    """Verifying a folder leaves every file of it as it was, and makes none."""

    def look() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")}

    store = ImageStore(url=str(tmp_path))
    overwrite(store, image_key(paid(store, "damaged")), b"dimaged")
    before = look()
    assert found_in(store)
    assert look() == before


@pytest.mark.integration
def test_a_store_at_work_is_in_order(tmp_path: Path) -> None:
    """While requests are paid for and recorded nothing looks wrong, however often one looks."""
    store = ImageStore(url=str(tmp_path))
    paid(store, "first")
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(paid, store, f"request {number}") for number in range(30)]
        looks = 0
        while looks < 3 or not all(future.done() for future in done):
            assert found_in(store) == {}
            looks += 1
        for future in done:
            future.result()


def test_progress_is_a_line_that_goes_away() -> None:
    """On a terminal one line changes and is taken away; in a log nothing is said of what takes no time."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        progress = Progress(stream)
        progress.tell("reading images", 1_000, 2_000, 5_000_000, 9_000_000)
        progress.clear()
    text = "reading images: 1,000 of 2,000, 5.0 MB of 9.0 MB"
    before, *_, after = terminal.getvalue().split(text)
    assert after.endswith("\r\x1b[1A\x1b[2K"), "the line is erased"
    assert "\n" not in before
    assert log.getvalue() == ""


def test_a_place_without_a_store_is_an_error(tmp_path: Path) -> None:
    """An address where nothing is, as after a slip of the pen, is not called in order."""
    with pytest.raises(StoreError, match="is it a store"):
        list(verify(ImageStore(url=str(tmp_path / "typo"))))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit status is 1 while something is wrong and 0 else; findings are lines, or JSON Lines with totals."""
    store = ImageStore(url=str(tmp_path))
    key = image_key(paid(store, "damaged"))
    assert main(["verify", str(tmp_path)]) == 0
    assert "all is well" in capsys.readouterr().out
    overwrite(store, key, b"dimaged")
    assert main(["verify", str(tmp_path), "--json"]) == 1
    finding, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert (finding["kind"], finding["records"]) == ("damaged", [record_key("damaged")])
    assert (summary["wrong"], summary["findings"]) == (1, {"damaged": 1})
    assert main(["verify", str(tmp_path), "--repair"]) == 0
    assert f"deleted {key}; released {record_key('damaged')}" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["{folder}/none"], "is it a store"),
        (["ftp://host/folder"], "is not understood"),
        (["{folder}", "--delete-orphans"], "needs --repair"),
        (["s3://bucket", "--endpoint-url", "http://127.0.0.1:9"], "nothing answers there"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    complaint: str,
) -> None:
    """What can't be verified gives status 2 and one line that says why."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "for-tests")
    assert main(["verify", *(word.format(folder=tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_listing_without_dates_and_sizes_is_looked_up(s3_server: S3Server) -> None:
    """Where a listing lacks them, an image's age and length are asked for: nothing is taken for old, lost or cut."""
    with quirky_server(s3_server) as quirky:
        store = quirky.store("listing without dates", "listing without sizes")
        paid(quirky.plain(store), "good")
        orphan = quirky.plain(store).put_image(fresh_image(b"nobody's"), {})
        (finding,) = verify(store)
        assert (finding.kind, finding.uri) == (Kind.ORPHAN, orphan.uri)
        assert abs((finding.modified or 0) - time.time()) < 60


def test_copies_of_batches_are_held_against_the_newest_manifest(store: ImageStore, tmp_path: Path) -> None:
    """A copy that is gone or has other bytes is found, a marked one by its own digest; other places are left."""
    place = ImageStore(url=tmp_path / "site")
    answers = {name: paid(store, name) for name in ("kept", "gone", "other", "longer", "elsewhere")}
    rows = []
    for number, (name, generation) in enumerate(answers.items()):
        (image,), marked = generation.images, f"{name}, marked".encode()
        uri = (
            place.write(f"{name}.png", marked, "image/png")
            if name != "elsewhere"
            else "s3://site/elsewhere.png"
        )
        copy = DeliveredImage(
            uri=uri,
            sha256=sha256(marked).hexdigest(),
            source_uri=image.uri,
            source_sha256=image.sha256,
            size_bytes=len(marked),
        )
        rows.append(Row.of(number, generation, delivered=(copy,)))
    earlier = rows[0].delivered[0].model_copy(update={"sha256": answers["kept"].images[0].sha256})
    old = Row.of(0, answers["kept"], delivered=(earlier,))
    for batch in "ab":
        store.write(f"batches/{batch}/manifest.jsonl", b"", "application/x-ndjson")
    newer, older = (listed.key for listed in store.list("batches/"))
    if store.url.startswith("s3:"):  # it tells times in whole seconds
        newer, older = older, newer
    store.write(older, manifest_of([old]), "application/x-ndjson")
    store.write(newer, manifest_of(rows), "application/x-ndjson")
    if not store.url.startswith("s3:"):
        age(store, older)
    assert not [*verify(store, delivered=place)]
    place.remove("gone.png")
    overwrite(place, "other.png", b"other; marked")
    overwrite(place, "longer.png", b"longer, and marked")
    said = [(finding.kind, finding.uri) for finding in verify(store, delivered=place)]
    assert said == [
        (Kind.COPY_GONE, place.uri("gone.png")),
        (Kind.COPY_CHANGED, place.uri("longer.png")),
        (Kind.COPY_CHANGED, place.uri("other.png")),
    ]
    assert [finding.uri for finding in verify(store, delivered=place, quick=True)] == [
        place.uri("gone.png"),
        place.uri("longer.png"),
    ]
    assert not [*verify(store)]


def test_command_with_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What became of copies is told, and left to a run of their batch."""
    store, place = ImageStore(url=tmp_path / "store"), ImageStore(url=tmp_path / "site")
    generation = paid(store, "an oak")
    copy = DeliveredImage(uri=place.uri("oak.png"), sha256=64 * "0", source_uri=generation.images[0].uri)
    row = Row.of(0, generation, delivered=(copy,))
    store.write("batches/a/manifest.jsonl", manifest_of([row]), "application/x-ndjson")
    asked = ["verify", store.url, "--delivered", place.url]
    assert main([*asked, "--repair"]) == 1
    shown = capsys.readouterr().out
    assert "copy-gone: left: the next run of its batch delivers it again" in shown
    assert "1 copies read: 1 wrong" in shown
