"""A batch that changed nothing refers to an earlier one: rows, pages, tables and commands find all there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prefect_ttapi import BatchReport, ImageStore
from prefect_ttapi.batch.items import Done
from prefect_ttapi.batch.known import last_folders
from prefect_ttapi.batch.options import BatchOptions, Plan
from prefect_ttapi.batch.recording import Recorder
from prefect_ttapi.cli import cleaning
from prefect_ttapi.cli.main import main
from prefect_ttapi.errors import BatchError
from prefect_ttapi.lineage.manifest import Row
from tests.batch.test_recording import WEBP, done
from tests.support.damaged_stores import age
from tests.support.engines import run_of
from tests.support.generations import API
from tests.support.rows import failed

DAY = 86_400.0


def record(store: ImageStore, run: str, dones: Iterable[Done], **options: object) -> BatchReport:
    """A batch as a run of this name leaves it."""
    chosen = BatchOptions(**{"name": "nightly", **options})
    plan = Plan("b", run_of(run), chosen, folder=f"batches/{run}")
    with Recorder(store, plan, API) as recorder:
        for each in dones:
            recorder.add(each)
        report = recorder.finish()
    recorder.remember(report)
    return report


def first() -> list[Done]:
    """Rows of a batch that paid: one image each, with names, of which one was there before."""
    made = [done(number) for number in range(3)]
    named = [replace(each, row=each.row.model_copy(update={"values": {"name": "n"}})) for each in made]
    return [*named[:2], replace(named[2], row=named[2].row.model_copy(update={"status": "cached"}))]


def again(dones: Iterable[Done], **changed: object) -> Iterator[Done]:
    """The same, as a later batch finds them."""
    for each in dones:
        kept = {"values": each.row.values, "delivered": each.row.delivered}
        yield replace(each, row=each.row.again(each.row.row, **kept | changed))


def files(store: ImageStore, run: str) -> set[str]:
    return {listed.key.removeprefix(f"batches/{run}/") for listed in store.list(f"batches/{run}/")}


def three_nights(store: ImageStore) -> list[BatchReport]:
    """Three nights, of which only the first one changed anything."""
    return [record(store, "one", first()), *(record(store, run, again(first())) for run in ("two", "three"))]


def test_it_writes_little_and_its_rows_are_those_that_it_would_have(each_store: ImageStore) -> None:
    """A file of 2 kB, whatever the number of rows; rows, totals, pages and tables are there, chains are not."""
    store, nights = each_store, three_nights(each_store)
    assert files(store, "two") == files(store, "three") == {"unchanged.json"}
    assert store.size("batches/two/unchanged.json") < 2_000
    for report in nights[1:]:
        assert report.same_as == "one"
        assert list(report.rows) == [each.row for each in again(first())]
        assert [row.status for row in report.rows[1:]] == ["cached"] * 2
        assert (report.totals.cached, report.totals.api_calls, report.totals.total_tokens) == (3, 0, 0)
        assert (report.manifest_uri, report.gallery_uri, report.parquet_uri) == (
            nights[0].manifest_uri,
            nights[0].gallery_uri,
            nights[0].parquet_uri,
        )
        with store.open(report.parquet_uri or "") as table:
            assert table.read(4) == b"PAR1"
    assert list(last_folders(store, "nightly", API)) == ["batches/one"]


@pytest.mark.parametrize(
    "change",
    ["paid", "failed", "fewer", "more", "values", "delivered", "prompts", "thumbnails", "page", "attempt"],
)
def test_what_changed_anything_is_written_as_a_whole(store: ImageStore, change: str) -> None:
    """Other rows, other options that pages show, an earlier page that is gone, another attempt at the same run."""
    dones = first()
    record(
        store, "one", dones if change != "thumbnails" else [replace(each, thumbnails=()) for each in dones]
    )
    later = list(again(dones))
    options: dict[str, object] = {"record_prompts": False} if change == "prompts" else {}
    if change == "page":
        store.remove("batches/one/index.html")
    if change == "attempt":
        record(store, "two", [*later, Done(failed(3))])
    rows: dict[str, list[Done]] = {
        "paid": [dones[0], *later[1:]],
        "failed": [*later[:2], Done(failed(2))],
        "fewer": later[:2],
        "more": [*later, *again([done(3)])],
        "values": [*again(dones[:1], values={"name": "other"}), *later[1:]],
        "delivered": [*again(dones[:1], delivered=()), *later[1:]],
    }
    report = record(store, "two", rows.get(change, later), **options)
    assert report.same_as is None
    assert {"manifest.jsonl", "index.html", "manifest.parquet", "thumbnails.zip"} <= files(store, "two")
    assert "unchanged.json" not in files(store, "two")
    assert [row.row for row in report.rows] == list(range(len(rows.get(change, later))))


def refused(request_id: str, row: int = 3, **changed: object) -> Done:
    """A row that is refused each night, with another request ID each time."""
    return Done(failed(row, prompt="no", error=f"refused, request id {request_id}", **changed))


def test_what_failed_again_is_no_change(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows tell of this night, wherever they are asked for; the others are the earlier batch's."""
    record(store, "one", [*first(), refused("a")])
    report = record(store, "two", [*again(first()), refused("b")])
    assert (report.same_as, report.ok, files(store, "two")) == ("one", False, {"unchanged.json"})
    for rows in (
        report.rows,
        BatchReport.model_validate_json(report.model_dump_json()).with_store(store).rows,
    ):
        assert [row.status for row in rows] == ["cached"] * 3 + ["failed"]
        assert rows[3].error == "refused, request id b"
    assert main(["ls", store.url, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (told["state"], told["cached"], told["failed"], told["api_calls"]) == ("unchanged", 3, 1, 1)
    assert main(["trace", "--run", "two", "--store", store.url, "--json"]) == 0
    assert "request id b" in capsys.readouterr().out
    with pytest.raises(BatchError, match="request id b"):
        report.raise_for_failures()
    assert record(store, "three", [*again(first()), refused("c")]).same_as == "one"


@pytest.mark.parametrize(
    "other",
    [
        [*again(first()), refused("b", values={"name": "other"})],
        [*again(first()), refused("b", error_type="UnknownOutcomeError")],
        [*again(first()), refused("b", request_hash="0" * 64)],
        [*list(again(first()))[:2], refused("b", 2), refused("b", 3)],
        [*again(first()), *again([done(3)])],
        [refused(str(number), number) for number in range(4)],
    ],
)
def test_what_failed_otherwise_is_a_change(store: ImageStore, other: list[Done]) -> None:
    """Other values, reasons or requests, more failures, fewer, or nothing but failures."""
    record(store, "one", [*first(), refused("a")])
    assert record(store, "two", other).same_as is None
    assert "manifest.jsonl" in files(store, "two")


def test_very_many_failures_are_a_change(store: ImageStore) -> None:
    """What a batch leaves that changed nothing stays small."""
    many = [refused("a", row) for row in range(3, 104)]
    record(store, "one", [*first(), *many])
    assert record(store, "two", [*again(first()), *many]).same_as is None
    record(store, "three", [*first(), *many[:-1]])
    assert record(store, "four", [*again(first()), *many[:-1]]).same_as == "three"


def test_pages_without_prompts_stand_for_their_like(store: ImageStore) -> None:
    """A page that shows no prompts stands for a batch that may show none, and for no other."""
    record(store, "one", first(), record_prompts=False)
    assert record(store, "two", again(first()), record_prompts=False).same_as == "one"
    assert record(store, "three", again(first())).same_as is None


def test_an_earlier_batch_that_goes_meanwhile_is_not_referred_to(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever deletes it between the look and the reference costs no rows."""
    record(store, "one", first())
    upload = Recorder._upload

    def meanwhile(recorder: Recorder, file: str, *rest: object) -> str:
        if file == "unchanged.json":
            store.remove("batches/one/manifest.jsonl")
        return upload(recorder, file, *rest)

    monkeypatch.setattr(Recorder, "_upload", meanwhile)
    report = record(store, "two", again(first()))
    assert report.same_as is None
    assert len(report.rows) == 3


def test_commands_find_what_it_refers_to(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """`ls`, `open`, `costs`, `retry`, `trace` and `verify` work on it as on any batch."""
    three_nights(store)

    def said(*words: str, status: int = 0) -> str:
        assert main([*words]) == status
        return capsys.readouterr().out

    lines = [json.loads(line) for line in said("ls", store.url, "--json").splitlines()]
    told = {each["batch"]: (each["name"], each["state"], each["rows"], each["cached"]) for each in lines}
    assert told == {
        "one": ("nightly", "ended", 3, 1),
        "two": ("nightly", "unchanged", 3, 3),
        "three": ("nightly", "unchanged", 3, 3),
    }
    opened = said("open", store.url, "two", "--print")
    assert "Nothing changed since the batch one" in opened
    assert opened.splitlines()[-1] == str(Path(store.url) / "batches/one/index.html")
    (sums,) = (json.loads(line) for line in said("costs", store.url, "--json").splitlines())
    assert sums["saved"] == 1 + 3 + 3
    assert "Nothing is to be asked for again in the batch two" in said("retry", store.url, "two")
    made = json.loads(said("trace", "--run", "two", "--store", store.url, "--json"))
    assert [(each["row"]["row"], each["row"]["status"]) for each in made["rows"]] == [
        (number, "cached") for number in range(3)
    ]
    verified = said("verify", store.url, "--quick", "--json", status=0)
    assert "rowless" not in verified


def test_what_is_referred_to_stays(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """`gc` keeps an old batch for the sake of a young one, and deletes it with the last one that needs it."""
    nights = ("one", "two", "three")
    for number, run in enumerate(nights):
        record(store, run, first() if run == "one" else again(first()))
        for file in files(store, run):
            age(store, f"batches/{run}/{file}", (30 - number) * DAY)
    # the oldest one is not the last of the list in a store that was copied
    for file in files(store, "one"):
        age(store, f"batches/one/{file}", 28.5 * DAY)
    assert main(["gc", store.url, "--yes", "--keep", "1"]) == 0
    assert "The batch one is old, and stays" in capsys.readouterr().out
    assert (files(store, "two"), files(store, "three")) == (set(), {"unchanged.json"})
    assert {"manifest.jsonl", "index.html"} <= files(store, "one")
    assert main(["gc", store.url, "--yes", "--older-than", "7d"]) == 0
    assert not any(files(store, run) for run in nights)


def test_a_batch_that_is_referred_to_meanwhile_stays(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch that ends between the list and the deletion finds what it refers to."""
    record(store, "one", first())
    for file in files(store, "one"):
        age(store, f"batches/one/{file}", 30 * DAY)
    monkeypatch.setattr(cleaning, "_show", lambda _: record(store, "two", again(first())))
    assert main(["gc", store.url, "--yes", "--older-than", "7d"]) == 1
    assert "may be needed by now" in capsys.readouterr().err
    assert {"manifest.jsonl", "index.html", "thumbnails.zip"} <= files(store, "one")


def test_rows_that_are_gone_are_told(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Where somebody deleted the earlier batch by hand, counts are known all the same, and verify says why."""
    record(store, "one", first())
    report = record(store, "two", again(first()))
    for file in files(store, "one"):
        store.remove(f"batches/one/{file}")
    assert main(["ls", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cached"] == 3
    main(["verify", store.url, "--quick", "--json"])
    assert '"rowless"' in capsys.readouterr().out
    assert record(store, "three", again(first())).same_as is None
    with pytest.raises(Exception, match=r"manifest\.jsonl"):
        list(report.rows)


def test_what_makes_no_sense_is_no_reference(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """A reference out of the store's batches, or torn, leads nowhere."""
    record(store, "one", first())
    store.write("batches/two/unchanged.json", b'{"same_as": "../x"}', "application/json")
    assert main(["ls", store.url, "--json"]) == 0
    told = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert told == ["running, or killed", "ended"]
    main(["verify", store.url, "--quick", "--json"])
    assert "it refers to no batch" in capsys.readouterr().out


def test_a_row_is_read_whatever_it_holds(store: ImageStore) -> None:
    """Text in any script, line ends and quotation marks in values: nothing of it changes on the way."""
    odd = {"name": 'z\u00f6e "\u79cb"\u2028\\ \n', "n": None}
    row = done(0).row.model_copy(update={"values": odd})
    record(store, "one", [Done(row, (WEBP,))])
    report = record(store, "two", again([Done(row, (WEBP,))]))
    assert report.same_as == "one"
    (read,) = report.rows
    assert isinstance(read, Row)
    assert read.values == odd
