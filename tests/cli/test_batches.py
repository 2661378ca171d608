"""Which batches a store holds, and a batch's gallery in a browser."""

from __future__ import annotations

import json
import os
import signal
import threading
import webbrowser
from pathlib import Path

import httpx
import pytest

from prefect_ttapi.cli.batches import Passing, batch_called, batches_of
from prefect_ttapi.cli.main import main
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.storage.layout import latest_key
from prefect_ttapi.storage.store import ImageStore
from tests.support.damaged_stores import age, paid
from tests.support.generations import API
from tests.support.rows import manifest_of
from tests.support.s3 import S3Server

PAGE = b"<h1>the gallery</h1>"


def batch(store: ImageStore, run_id: str, *rows: Row, name: str = "", page: bool = True) -> str:
    """A batch as a run leaves it; its folder."""
    folder = f"batches/{run_id}"
    store.write(f"{folder}/manifest.jsonl", manifest_of(rows), "application/x-ndjson")
    if page:
        store.write(f"{folder}/index.html", PAGE, "text/html")
    if name:
        told = json.dumps({"name": name, "folders": [folder]})
        store.write(latest_key(name, API), told.encode(), "application/json")
    return folder


@pytest.fixture
def spring(each_store: ImageStore) -> ImageStore:
    """A store with one batch: an image that was paid for, one that was there, and a failure."""
    made = paid(each_store, "a meadow")
    failed = Row(row=2, status="failed", error="refused", error_type="ModerationError")
    rows = (Row.of(0, made), Row.of(1, made, "cached"), failed)
    batch(each_store, "3f2a0001", *rows, name="spring")
    return each_store


@pytest.fixture
def usual_aws(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_access_key)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.mark.usefixtures("usual_aws")
def test_batches_are_told_with_name_counts_and_money(
    spring: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each status is counted; what was there before costs nothing."""
    assert main(["ls", spring.url, "--json", "--price", "dall-e-2=0.02"]) == 0
    (told,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert told["batch"] == "3f2a0001"
    assert told["name"] == "spring"
    assert [told[name] for name in ("rows", "generated", "cached", "failed", "usd")] == [3, 1, 1, 1, 0.02]


def test_the_newest_is_first_and_a_killed_batch_is_told(
    store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch without a manifest has the rows of its parts."""
    for file in ("manifest.jsonl", "index.html"):
        age(store, f"{batch(store, 'older')}/{file}")
    part = manifest_of([Row(row=0, status="skipped"), Row(row=1, status="skipped")])
    store.write("batches/newer/task-1/parts/000001.jsonl", part, "application/x-ndjson")
    assert main(["ls", store.url]) == 0
    _, newer, older = capsys.readouterr().out.splitlines()
    assert newer.startswith("newer/task-1 ")
    assert newer.split()[3:7] == ["running,", "or", "killed", "2"]
    assert older.startswith("older ")
    assert main(["ls", store.url, "--limit", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "and 1 more: --limit says how many are listed"
    assert main(["ls", store.url, "--limit", "0"]) == 2


@pytest.mark.parametrize("command", ["ls", "open", "costs", "gc", "retry"])
def test_a_folder_that_is_not_there(
    command: str, store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt store is no empty one, and is not made."""
    assert main([command, store.url]) == 2
    assert f"there is no folder {store.url}" in capsys.readouterr().err
    assert not Path(store.url).exists()


def test_a_store_without_batches(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    Path(store.url).mkdir()
    assert main(["ls", store.url]) == 0
    assert "holds no batches yet" in capsys.readouterr().out
    assert main(["open", store.url]) == 2


def test_a_batch_is_called_by_its_name_or_the_beginning_of_its_id(store: ImageStore) -> None:
    """What could mean several, or none, is refused."""
    batch(store, "3f2a0001", name="spring")
    batch(store, "3f2a0002")
    assert batch_called(store, "spring").id == batch_called(store, "3f2a0001").id == "3f2a0001"
    assert batch_called(store, "batches/3f2a0002/").id == "3f2a0002"
    assert batch_called(store, None).id == batches_of(store)[0].id
    for wanted in ("3f2a", "autumn"):
        with pytest.raises(ValueError, match="ls shows which there are"):
            batch_called(store, wanted)


@pytest.mark.usefixtures("usual_aws")
def test_a_signed_link_is_printed(spring: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder it is the page's path; from a private bucket, a link that anyone can read for an hour."""
    assert main(["open", spring.url, "spring", "--print"]) == 0
    where = capsys.readouterr().out.strip()
    if spring.url.startswith("s3://"):
        assert httpx.get(where).content == PAGE
    else:
        assert Path(where).read_bytes() == PAGE


class Browser(webbrowser.BaseBrowser):
    """Looks at the page that it is given, and has somebody press Ctrl-C then."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def open(self, url: str, *_: object) -> bool:
        def look() -> None:
            self.seen.append(httpx.get(url).content)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=look).start()
        return True


@pytest.mark.usefixtures("usual_aws")
def test_a_gallery_can_be_looked_at_until_ctrl_c(
    s3_store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """A browser that can't read the bucket sees the page; Ctrl-C is how the command ends, and no error."""
    batch(s3_store, "3f2a0001")
    webbrowser.register("of-the-tests", None, browser := Browser(), preferred=True)
    assert main(["open", s3_store.url]) == 0
    assert browser.seen == [PAGE]
    assert capsys.readouterr().err == ""


def test_a_private_bucket_is_passed_on_to_a_browser(spring: ImageStore) -> None:
    """Pages and images can be read by whoever knows the address, nothing else can, and nobody else can."""
    image = next(listed.key for listed in spring.list("images/"))
    record = next(listed.key for listed in spring.list("ledger/"))
    with Passing(spring) as passing:
        threading.Thread(target=passing.serve_forever, kwargs={"poll_interval": 0.01}).start()
        page = httpx.get(passing.url("batches/3f2a0001/index.html"))
        assert (page.content, page.headers["Content-Type"]) == (PAGE, "text/html; charset=utf-8")
        assert httpx.get(passing.url(image)).content == b"a meadow"
        refused = [passing.url(record), passing.url("batches/none.html"), passing.url("batches/%2e%2e/x")]
        refused.append(passing.url(image).replace(passing.token, "guess"))
        assert {httpx.get(url).status_code for url in refused} == {404}
        passing.shutdown()
