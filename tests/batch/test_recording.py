"""The recorder: what a batch leaves behind, without a Prefect run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from prefect_ttapi import Budget, ImageStore, Price
from prefect_ttapi.batch.items import Done
from prefect_ttapi.batch.options import BatchOptions, Plan
from prefect_ttapi.batch.recording import Recorder
from prefect_ttapi.errors import BatchError
from prefect_ttapi.images.renditions import thumbnail
from prefect_ttapi.lineage.gallery import ThumbnailPack
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.report import BatchReport
from tests.support.engines import run_of
from tests.support.meddling import meddling_proxy
from tests.support.rows import failed, generated, picture
from tests.support.s3 import S3Server

FOLDER = "batches/run"
WEBP = thumbnail(io.BytesIO(picture()))


def done(number: int, more: int = 0) -> Done:
    """An answered request whose image is no other's, with a thumbnail that is so many bytes longer than it must be."""
    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    row = generated(number)
    image = row.images[0].model_copy(update={"sha256": sha256})
    return Done(row.model_copy(update={"images": (image,)}), (WEBP + bytes(more),), 1)


def record(
    store: ImageStore, dones: Iterable[Done], notes: tuple[str, ...] = (), **options: object
) -> BatchReport:
    plan = Plan("b", run_of(), BatchOptions(name="campaign", **options), folder=FOLDER)
    with Recorder(store, plan, "sandbox") as recorder:
        for each in dones:
            recorder.add(each)
        return recorder.finish(notes)


def files(store: ImageStore) -> set[str]:
    return {found.key.removeprefix(f"{FOLDER}/") for found in store.list(f"{FOLDER}/")}


def thumbnails_in(store: ImageStore, page: str) -> list[str | None]:
    text = (store.read(f"{FOLDER}/{page}") or b"").decode()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    return [image["thumbnail"] for row in data["rows"] for image in row["images"]]


def test_everything_is_there_in_order(store: ImageStore) -> None:
    """Rows that come in any order are in order in both manifests; every page has its thumbnails, and so has the zip."""
    report = record(store, (done(number) for number in reversed(range(501))))
    names = {
        "manifest.jsonl",
        "manifest.parquet",
        "thumbnails.zip",
        "index.html",
        "page-2.html",
        "search.html",
    }
    assert files(store) == names
    assert [row.row for row in report.rows] == list(range(501))
    with store.open(report.parquet_uri or "") as file:
        table: pyarrow.Table = parquet.read_table(file)
    assert table["row"].to_pylist() == list(range(501))
    assert [len(thumbnails_in(store, page)) for page in ("index.html", "page-2.html")] == [500, 1]
    assert thumbnails_in(store, "page-2.html") == [base64.b64encode(WEBP).decode()]
    pack = ThumbnailPack.of(store, store.uri(f"{FOLDER}/thumbnails.zip"))
    assert pack
    assert pack.get(hashlib.sha256(b"500").hexdigest()) == WEBP
    pack.close()
    with store.open(store.uri(f"{FOLDER}/thumbnails.zip")) as file, zipfile.ZipFile(file) as read:
        assert len(read.namelist()) == 501
    assert not [t for t in threading.enumerate() if t.name in ("ttapi-live", "ttapi-parts")]


def test_the_manifest_is_written_though_others_fail(
    store: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in the way of thumbnails, page and Parquet costs these, said in the log, and not the manifest."""
    others = ("thumbnails.zip", "index.html", "manifest.parquet")
    for name in others:
        (Path(store.url) / FOLDER / name / "x").mkdir(parents=True)
    report = record(store, [done(0)])
    assert [row.row for row in report.rows] == [0]
    assert report.parquet_uri is None
    assert all(
        what in caplog.text
        for what in ("thumbnails are not", "gallery page is not", "Parquet manifest is not")
    )


def test_the_report_counts_money_and_what_was_saved(store: ImageStore) -> None:
    """With prices the report says what was spent and saved; latencies by model, concurrency and notes are in it."""
    cached = Done(generated(1, status="cached", api_calls=0, seconds=0, count=2))
    report = record(
        store,
        [done(0), cached, Done(failed(2))],
        notes=("40 tokens over the limit of 4,000",),
        budget=Budget(prices={"gpt-image-2": Price(per_image=0.5)}),
    )
    assert (report.totals.usd, report.totals.usd_saved) == (0.5, 1.0)
    assert (report.totals.images_cached, report.totals.tokens_saved) == (2, 4169)
    assert report.latency["gpt-image-2"]["p50"] == pytest.approx(21.5, rel=0.03)
    assert report.concurrency == pytest.approx(1)
    assert report.notes == ("40 tokens over the limit of 4,000",)
    assert report.summary.startswith(
        "3 requests: 1 generated, 1 cached, 1 failed; 3 images, 2 API calls, 4,169 tokens, 0.50 USD,"
    )
    assert BatchReport.model_validate_json(report.model_dump_json()).model_dump() == report.model_dump()


def test_a_report_stays_small(store: ImageStore) -> None:
    """As a flow's result the report of 10,000 rows takes less than 10 kB: its rows are in the manifest."""
    report = record(store, [done(0), Done(failed(1))])
    totals = report.totals
    while totals.rows < 10_000:
        totals = totals.add(generated(seconds=totals.rows)).add(failed())
    assert len(report.model_copy(update={"totals": totals}).model_dump_json()) < 10_000


def test_failures_are_told_by_kind_with_examples(store: ImageStore) -> None:
    """Of many failures the error counts each kind, quotes three, and holds the report."""
    bad = [Done(failed(number, error=f"reason {number}")) for number in range(5)]
    skipped = Done(Row(row=5, status="skipped", error="not sent", error_type="BudgetExceeded"))
    report = record(store, [*bad, skipped])
    with pytest.raises(Exception, match="5 x ModerationError, 1 x BudgetExceeded") as caught:
        report.raise_for_failures()
    assert str(caught.value).count("\n") == 3
    assert "request 2: reason 2" in str(caught.value)
    assert caught.value.report == report


def test_each_failure_is_a_warning_up_to_a_bound(store: ImageStore, caplog: pytest.LogCaptureFixture) -> None:
    """A failed row is one warning with row, name and reason; after 50 of them one line tells how many more."""
    named = failed(0, error="refused:\n no", values={"name": "cup 7"})
    report = record(store, [Done(named), done(1), *(Done(failed(row)) for row in range(2, 54))])
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines[0] == "Request 0 (cup 7) failed: ModerationError: refused: no"
    assert lines[1].startswith(
        f"Request 2 (gpt-image-2 {failed(2).request_hash[:12]}) failed: ModerationError: the prompt"
    )
    assert lines[50:] == [f"3 more requests failed, see {report.manifest_uri}"]


def test_failures_are_told_without_prompts(store: ImageStore, caplog: pytest.LogCaptureFixture) -> None:
    """Where prompts are not recorded the log's reasons don't quote them, those of illegal items neither."""
    illegal = Row(
        row=1, status="failed", given={"prompt": "a heron"}, error="'a heron' is no", error_type="ValueError"
    )
    quoted = failed(0, prompt="a heron", error="'a heron' is refused")
    record(store, [Done(quoted), Done(illegal)], record_prompts=False)
    assert "heron" not in caplog.text
    assert "Request 1 (illegal) failed: ValueError: 'prompt not recorded' is no" in caplog.text


def test_rows_on_s3_are_read_once(s3_server: S3Server) -> None:
    """However often a report's rows are looked at, counted and quoted, its manifest is fetched once."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url)
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings)
        report = record(store, [done(0), Done(failed(1)), done(2)])
        proxy.seen.clear()
        assert (len(report.rows), report.rows[-1].row) == (3, 2)
        assert [row.row for row in report.rows] == [row.row for row in report.rows[0:3]] == [0, 1, 2]
        with pytest.raises(BatchError):
            report.raise_for_failures()
        assert [method for method, _ in proxy.seen] == ["GET"]
        assert list(pickle.loads(pickle.dumps(report)).with_store(store).rows) == list(report.rows)


PEAK = """
import resource, sys
from prefect_ttapi import ImageStore
from tests.batch.test_recording import done, record
record(ImageStore(url=sys.argv[1]), (done(number, 8_000) for number in range(int(sys.argv[2]))))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.integration  # seconds of work
def test_memory_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    """2,500 rows more, with thumbnails of 8 kB, take less than 8 MB more memory, in kB at the peak of a process."""

    def peak(rows: int) -> int:
        command = [sys.executable, "-c", PEAK, str(tmp_path / str(rows)), str(rows)]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.split()[-1])

    assert peak(3_500) - peak(1_000) < 8_000
