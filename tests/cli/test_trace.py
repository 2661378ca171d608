"""Who made an image, and what did a run make: the chain in both directions."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.cli.chain import Made, Origin, Search, trace_object
from prefect_ttapi.cli.main import main
from prefect_ttapi.errors import InvalidResponseError
from prefect_ttapi.generation.delivery import Delivery, metadata_of
from prefect_ttapi.generation.files import Provenance
from prefect_ttapi.images.labels import mark
from prefect_ttapi.images.renditions import Rendition, versions_of
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.images.xmp import Statement
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import DeliveredImage, Generation, Usage
from prefect_ttapi.storage.objects import Facts, ascii_metadata
from prefect_ttapi.storage.store import ImageStore
from tests.support.certificates import signer
from tests.support.engines import engine_of
from tests.support.generations import API, fresh_image, generation_of
from tests.support.hostile import HostileServer, answer
from tests.support.ledgers import acquire, recorded
from tests.support.pictures import png_of
from tests.support.rows import manifest_of
from tests.support.s3 import S3Server

RUN = "0b6f5a52-8d6e-4b1c-9d0e-4a61f3f6a001"
REQUEST = ImageRequest(prompt="a lighthouse\x1b[2J\nat dusk", model="gpt-image-1", quality="high")


@dataclass(frozen=True)
class Campaign:
    """A batch of one request: its store, the shop it was delivered to, and what is where."""

    store: ImageStore
    shop: ImageStore
    generation: Generation
    copy: DeliveredImage
    options: tuple[str, ...]

    def trace(self, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
        status = main(["trace", *words, *self.options])
        printed = capsys.readouterr()
        return status, printed.out, printed.err


def record(store: ImageStore, request: ImageRequest, data: bytes, run_id: str) -> Generation:
    facts = {
        "usage": Usage(input_tokens=9, output_tokens=4160, total_tokens=4169),
        "request_id": "req-77",
        "flow_run_id": run_id,
        "task_run_id": "task-5",
        "package_version": "0.0.9",
    }
    image = store.put_image(fresh_image(data), {"request-hash": request.request_hash})
    stored = image.model_copy(update={"revised_prompt": "a tall lighthouse"})
    with acquire(Ledger(store, API, run_id), request.request_hash) as claim:
        claim.before_sending()
        return recorded(claim, generation_of(request, stored).model_copy(update=facts)).generation


def delivered(generation: Generation, store: ImageStore, shop: ImageStore) -> DeliveredImage:
    delivery = Delivery(shop, "shots/{name}.{ext}", "b", datetime.now(UTC), source=store)
    return delivery.deliver(generation, {"name": "Zoë"})[0]


@pytest.fixture(params=["folder", "s3"])
def campaign(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Campaign:
    """On each kind of store."""
    if request.param == "folder":
        store, shop = ImageStore(url=str(tmp_path / "a store")), ImageStore(url=str(tmp_path / "shop"))
        options: tuple[str, ...] = ()
    else:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_access_key)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        options = ("--endpoint-url", s3_server.url)
        places = (f"s3://{s3_server.new_bucket()}/{prefix}" for prefix in ("campaigns/may", "site"))
        store, shop = (ImageStore(url=url, endpoint_url=s3_server.url) for url in places)
    generation = record(store, REQUEST, b"pixels", RUN)
    copy = delivered(generation, store, shop)
    rows = [
        Row(row=0, status="skipped", error="out of budget", error_type="BudgetExceeded"),
        Row.of(1, generation, delivered=(copy,), values={"sku": "L-12"}),
    ]
    store.write(f"batches/{RUN}/manifest.jsonl", manifest_of(rows), "application/x-ndjson")
    return Campaign(store, shop, generation, copy, options)


#: Where each part of the answer is named: object, record, request, runs, call, version, row, copy.
CHAIN = ["gpt-image-1", "quality: high", "a tall lighthouse", "req-77", "4,169 tokens", f"flow run {RUN}"]
CHAIN += ["task run task-5", "prefect-ttapi 0.0.9", "https://api.ttapi.io", "sku=L-12", "row 1 of"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda campaign: [campaign.copy.uri],
        lambda campaign: [campaign.generation.images[0].uri],
        lambda campaign: [campaign.store.uri(f"ledger/api.ttapi.io/{REQUEST.request_hash}.json")],
        lambda campaign: [REQUEST.request_hash, "--store", campaign.store.url],
    ],
    ids=["delivered copy", "stored image", "record", "request hash"],
)
def test_who_made_it(
    campaign: Campaign, ask: Callable[[Campaign], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """From each end of the chain the whole of it is told, on lines that no prompt can break or colour."""
    status, out, err = campaign.trace(*ask(campaign), capsys=capsys)
    assert (status, err) == (0, "")
    missing = [
        part for part in [*CHAIN, campaign.copy.uri, campaign.generation.images[0].uri] if part not in out
    ]
    assert missing == []
    assert "a lighthouse [2J at dusk" in out
    assert "\x1b" not in out
    status, out, _ = campaign.trace(*ask(campaign), "--json", capsys=capsys)
    origin = Origin.model_validate(json.loads(out))
    assert origin.entries[0].generation == campaign.generation
    assert [source.row.row for source in origin.rows] == [1]


def test_what_most_people_ask_comes_first(campaign: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompt, model, date, cost at the given price, and the run, before the chain."""
    price = ["--price", "gpt-image-1=0.04"]
    _, out, _ = campaign.trace(campaign.copy.uri, *price, capsys=capsys)
    made = campaign.generation
    assert out.splitlines()[:6] == [
        "Prompt  a lighthouse [2J at dusk",
        "Model   gpt-image-1",
        f"Date    {made.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "Cost    1 image, 1 API call, 4,169 tokens, 0.0400 USD",
        f"Run     {RUN}",
        "",
    ]


@pytest.mark.parametrize(
    "ask",
    [
        lambda campaign: ["--run", RUN, "--store", campaign.store.url],
        lambda campaign: [campaign.store.uri(f"batches/{RUN}/manifest.jsonl")],
    ],
    ids=["run", "manifest"],
)
def test_what_it_made(
    campaign: Campaign, ask: Callable[[Campaign], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run, by its id or its manifest: each row with its images and copies."""
    status, out, _ = campaign.trace(*ask(campaign), capsys=capsys)
    assert status == 0
    for part in ("row 0: skipped", "BudgetExceeded: out of budget", "row 1: generated", campaign.copy.uri):
        assert part in out
    _, out, _ = campaign.trace(*ask(campaign), "--json", capsys=capsys)
    made = json.loads(out)
    assert [source["row"]["status"] for source in made["rows"]] == ["skipped", "generated"]
    assert made["manifests"] == [campaign.store.uri(f"batches/{RUN}/manifest.jsonl")]


def test_a_run_without_a_batch(tmp_path: Path) -> None:
    """What a run paid for is found in the ledger where it left no manifest."""
    store = ImageStore(url=str(tmp_path))
    mine = record(store, REQUEST, b"mine", "run-of-mine")
    record(store, ImageRequest(prompt="another's"), b"another's", "another-run")
    made = Search(store).run("run-of-mine")
    assert isinstance(made, Made)
    assert [source.row.images for source in made.rows] == [mine.images]


def test_an_answer_that_is_kept_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was paid for and gave no images leads to the answer as it came, with why, and what becomes of it."""
    store, request = (
        ImageStore(url=str(tmp_path)),
        ImageRequest(prompt="a sealed letter", model="gpt-image-1"),
    )
    page = answer(200, b"<html>thank you for your order</html>", {"Content-Type": "text/html"})
    with (
        HostileServer(page) as server,
        TTAPIClient("any-key", server.url) as client,
        pytest.raises(InvalidResponseError),
    ):
        engine_of(store, client, "one").generate(request)
    (kept,) = (store.uri(found.key) for found in store.list("answers/"))
    assert main(["trace", request.request_hash, "--store", store.url]) == 0
    told = capsys.readouterr().out
    assert f"answer kept {kept}" in told
    assert "37 bytes, run one, " in told
    assert "the next run reads it again" in told
    assert main(["trace", request.request_hash, "--store", store.url, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert entry["kept"][0]["uri"] == kept


def test_any_file_is_known_by_its_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that lost its metadata is found in the store that it came from, and without one the line says so."""
    store = ImageStore(url=str(tmp_path / "store"))
    made = record(store, REQUEST, b"pixels", RUN)
    download = tmp_path / "download.png"
    shutil.copy(unquote(urlsplit(made.images[0].uri).path), download)
    assert main(["trace", str(download)]) == 1
    assert "name the store (--store)" in capsys.readouterr().err
    origin = trace_object(str(download), store)
    assert origin.request_hash == REQUEST.request_hash
    assert origin.image == made.images[0]


def test_a_rendition_leads_to_its_image(tmp_path: Path) -> None:
    """A delivered object with bytes of its own names the image that it was made from."""
    store, shop = ImageStore(url=str(tmp_path / "store")), ImageStore(url=str(tmp_path / "shop"))
    made = record(store, REQUEST, b"pixels", RUN)
    said = ascii_metadata(metadata_of(made, made.images[0]) | {"sha256": "f" * 64})
    shop.objects.write("small.webp", fresh_image(b"few pixels").open, Facts("image/webp", metadata=said))
    origin = trace_object(shop.uri("small.webp"))
    assert origin.image == made.images[0]
    assert origin.delivered is not None
    assert origin.delivered.metadata["sha256"] == "f" * 64
    assert origin.gaps == ()


def test_a_file_alone_leads_to_its_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an object's metadata, by what the file's XMP says; also where another program has written it anew."""
    store, shop = ImageStore(url=str(tmp_path / "store")), ImageStore(url=str(tmp_path / "shop"))
    made = record(store, REQUEST, png_of(8, 8, zlib.compress(bytes(8 * 25))), RUN)
    delivery = Delivery(
        shop,
        "{rendition}",
        "b",
        datetime.now(UTC),
        versions=versions_of([Rendition(max_size=4)]),
        provenance=Provenance(),
    )
    for copy in delivery.deliver(made, {}):
        data = shop.read_bytes(copy.uri)
        with Image.open(io.BytesIO(data)) as image:
            image.save(edited := io.BytesIO(), "JPEG", xmp=image.info["xmp"])
        for number, download in enumerate(
            (data, edited.getvalue(), data.replace(b":prefect-ttapi:", b":somebody-else:"))
        ):
            path = tmp_path / f"{number}.bin"
            path.write_bytes(download)
            assert main(["trace", str(path), "--store", store.url]) == 0
            out = capsys.readouterr().out
            assert "found by the XMP in the file" in out
            assert f"request {REQUEST.request_hash}" in out
            origin = trace_object(str(path), store)
            assert (origin.image, origin.found_by) == (made.images[0], "the XMP in the file")
    for uri, by in ((copy.uri, "its object's metadata"), (made.images[0].uri, "its address")):
        assert trace_object(uri).found_by == by


def test_a_signed_file_leads_to_its_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its valid Content Credentials, whatever else it says; who signed it is told, and why that is not valid."""
    store = ImageStore(url=str(tmp_path / "store"))
    made = record(store, REQUEST, png_of(8, 8, zlib.compress(bytes(8 * 25))), RUN)
    (image,) = made.images
    with store.open(image.uri) as file:
        lie = Spool.of(mark(file, Statement("m", "0" * 64, "1" * 64)))
    told = Statement(REQUEST.model, made.request_hash, image.sha256)
    download = tmp_path / "download.png"
    download.write_bytes(signer().sign(lie.open, "image/png", told).read_bytes())
    assert main(["trace", str(download), "--store", store.url]) == 0
    out = capsys.readouterr().out
    assert "found by its Content Credentials" in out
    assert "Content Credentials: signed by Acme shop, with prefect-ttapi; valid, but nobody vouches" in out
    assert trace_object(str(download), store).image == image
    monkeypatch.setitem(sys.modules, "c2pa", None)
    main(["trace", str(download), "--store", store.url])
    assert 'can be read with pip install "prefect-ttapi[provenance]"' in capsys.readouterr().out
    monkeypatch.undo()
    damaged = bytearray(download.read_bytes())
    damaged[-20] ^= 1
    download.write_bytes(damaged)
    main(["trace", str(download), "--store", store.url])
    out = capsys.readouterr().out
    assert "Acme shop, with prefect-ttapi; not valid: " in out
    assert "found by" not in out


def test_xmp_that_names_nothing_known_is_passed_over(tmp_path: Path) -> None:
    """What anybody wrote into a copy of an image does not hide whose bytes, or whose request, it is."""
    store = ImageStore(url=str(tmp_path / "store"))
    for number, said in enumerate((("0" * 64, "1" * 64), ("../..", "<b>"), ("*" * 64, ""))):
        lie = mark(io.BytesIO(png_of(8, 8 + number)), Statement("m", *said))
        made = record(store, REQUEST.model_copy(update={"variant": f"{number}"}), b"".join(lie), RUN)
        download = tmp_path / f"{number}.png"
        download.write_bytes(store.read_bytes(made.images[0].uri))
        origin = trace_object(str(download), store)
        assert (origin.image, origin.found_by) == (made.images[0], "the SHA-256 of its bytes")


def test_a_source_that_can_not_be_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy that names no possible store says nothing: one line, without what it said."""
    shop = ImageStore(url=str(tmp_path))
    said = {"source-uri": f"s3://pictures/%1B[2J/images/{'0' * 64}.png"}
    shop.objects.write("odd.png", fresh_image(b"pixels").open, Facts("image/png", metadata=said))
    assert main(["trace", shop.uri("odd.png")]) == 1
    error = capsys.readouterr().err
    assert "does not say where it came from" in error
    assert error.count("\n") == 1


def test_rows_of_other_runs_are_found_when_asked_for(tmp_path: Path) -> None:
    """A batch that found the image paid for has its row, too, in a manifest of its own."""
    store = ImageStore(url=str(tmp_path))
    made = record(store, REQUEST, b"pixels", RUN)
    rows = [Row(row=0, status="skipped"), Row.of(1, made, "cached")]
    store.write("batches/another-run/manifest.jsonl", manifest_of(rows), "application/x-ndjson")
    assert trace_object(made.images[0].uri).rows == ()
    found = trace_object(made.images[0].uri, everywhere=True).rows
    assert [(source.row.row, source.row.status) for source in found] == [(1, "cached")]


def test_a_copy_leads_to_the_row_of_the_run_that_delivered_it(tmp_path: Path) -> None:
    """A batch that found the image paid for delivered it: its row is the copy's source, not only the payer's."""
    store, shop = ImageStore(url=str(tmp_path / "store")), ImageStore(url=str(tmp_path / "shop"))
    made = record(store, REQUEST, b"pixels", RUN)
    delivery = Delivery(shop, "{sku}.{ext}", "b", datetime.now(UTC), source=store, run_id="later-run")
    (copy,) = delivery.deliver(made, {"sku": "7"})
    row = Row.of(0, made, "cached", delivered=(copy,), values={"sku": "7"})
    store.write("batches/later-run/manifest.jsonl", row.line(), "application/x-ndjson")
    assert [source.row.values for source in trace_object(copy.uri).rows] == [{"sku": "7"}]


def test_a_copy_outlives_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where record and image are gone, what the copy says of itself is told, and the status says what is lost."""
    store, shop = ImageStore(url=str(tmp_path / "store")), ImageStore(url=str(tmp_path / "shop"))
    copy = delivered(record(store, REQUEST, b"pixels", RUN), store, shop)
    shutil.rmtree(tmp_path / "store")
    assert main(["trace", copy.uri]) == 1
    out = capsys.readouterr().out
    assert f"request {REQUEST.request_hash}" in out
    assert f"not found: {store.identity} has no record of it" in out


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["{folder}/none.png"], 1, "there is no"),
        (["{folder}/images/" + "0" * 64 + ".png"], 1, "there is no"),
        (["1" * 64, "--store", "{folder}"], 1, "has no record of the request"),
        (["--run", "nobody", "--store", "{folder}"], 1, "knows nothing of the run"),
        (["--run", "../..", "--store", "{folder}"], 2, "no run's id"),
        (["0" * 64], 2, "needs --store"),
        ([], 2, "say either"),
        (["s3://bucket"], 2, "no object in it"),
        (["s3://pic tures/a.png"], 2, "no legal bucket name"),
        (["s3://pictures/a.png", "--endpoint-url", "minio"], 2, "is no address like"),
    ],
)
def test_what_cannot_be_traced_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, complaint: str
) -> None:
    """What is not there, or not understood, is one line and a status."""
    assert main(["trace", *(word.format(folder=tmp_path) for word in words)]) == status
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
