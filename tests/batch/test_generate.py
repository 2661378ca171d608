from __future__ import annotations

import asyncio
import json
import threading
from base64 import b64encode
from html import unescape
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import Artifact

from prefect_ttapi import (
    BatchError,
    BatchReport,
    Budget,
    IllegalBatchError,
    ImageRequest,
    ImageStore,
    Price,
    StoreError,
    TTAPICredentials,
    agenerate_batch,
    generate_batch,
)
from prefect_ttapi.batch.items import Item
from prefect_ttapi.batch.lanes import Lane, generate_lane
from prefect_ttapi.batch.options import BatchOptions, Plan
from prefect_ttapi.generation.runs import RunContext
from prefect_ttapi.sandbox import Sandbox
from tests.support.pictures import png_of
from tests.support.s3 import S3Server

pytestmark = pytest.mark.usefixtures("prefect_server")


def prompts(count: int, **fields: object) -> list[dict[str, object]]:
    return [{"prompt": f"tree {number}", "model": "gpt-image-1"} | fields for number in range(count)]


def manifest(report: BatchReport) -> list[dict]:
    lines = Path(report.manifest_uri.removeprefix("file://")).read_text().splitlines()
    return [json.loads(line) for line in lines]


def artifacts(report: BatchReport) -> list[Artifact]:
    async def read() -> list[Artifact]:
        async with get_client() as client:
            found = await client.read_artifacts(limit=200)
            return [artifact for artifact in found if str(artifact.flow_run_id) == report.flow_run_id]

    return asyncio.run(read())


def test_rows_come_in_order_and_a_second_batch_is_free(store, credentials, sandbox: Sandbox):
    """Every request has its row, in order; a second batch finds them all and calls nothing."""
    report = generate_batch(prompts(12), credentials, store, max_in_flight=4)
    assert [row.request.prompt for row in report.rows] == [f"tree {number}" for number in range(12)]
    assert {row.status for row in report.rows} == {"generated"}
    again = generate_batch(prompts(12), credentials, store)
    assert {row.status for row in again.rows} == {"cached"}
    assert again.totals.api_calls == 0
    assert [row.images for row in again.rows] == [row.images for row in report.rows]
    assert sandbox.calls == 12


def test_the_manifest_lies_beside_the_images(store, credentials):
    """The manifest has a line per request, in order, at batches/<flow run>/manifest.jsonl, and no secrets."""
    report = generate_batch(prompts(3), credentials, store)
    assert report.manifest_uri == store.uri(f"batches/{report.flow_run_id}/manifest.jsonl")
    rows = manifest(report)
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert all(row["images"][0]["sha256"] in row["images"][0]["uri"] for row in rows)
    assert (
        Path(report.gallery_uri.removeprefix("file://"))
        .read_text()
        .lstrip()
        .lower()
        .startswith("<!doctype html>")
    )


def test_requests_are_side_by_side_up_to_the_limit(store, sandbox: Sandbox):
    """`max_in_flight` requests are under way at once, and no more."""
    with Sandbox(tiny=True, latency=0.3) as slow:
        credentials = TTAPICredentials(api_key="sandbox", base_url=slow.base_url)
        generate_batch(prompts(12), credentials, store, max_in_flight=5)
        assert slow.most_in_flight == 5


def test_shards_carry_many_requests(store, credentials, sandbox: Sandbox):
    """With `shard_size` a task run carries several requests; rows are the same."""
    report = generate_batch(prompts(10), credentials, store, shard_size=4, max_in_flight=3)
    assert [row.row for row in report.rows] == list(range(10))
    assert report.totals.generated == 10
    assert len({row.task_run_id for row in report.rows}) == 3
    assert sandbox.most_in_flight <= 3


def test_one_bad_prompt_costs_one_row(store, credentials, sandbox: Sandbox, caplog):
    """A refused prompt is a failed row and the run's warning; others go on; the error says how many of what kind."""
    requests = prompts(6)
    requests[2]["prompt"] = "[[sandbox:moderation]] something refused"
    with pytest.raises(BatchError, match="1 x ModerationError") as caught:
        generate_batch(requests, credentials, store)
    rows = list(caught.value.report.rows)
    assert [row.status for row in rows] == ["generated"] * 2 + ["failed"] + ["generated"] * 3
    assert rows[2].error_type == "ModerationError"
    (told,) = [line for line in caplog.records if line.getMessage().startswith("Request 2 (")]
    assert (told.name, told.levelname) == ("prefect.flow_runs", "WARNING")
    assert "failed: ModerationError: " in told.getMessage()


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "AuthenticationError"), (402, "InsufficientBalanceError")]
)
def test_account_errors_stop_the_rest(store, credentials, sandbox: Sandbox, status: int, kind: str):
    """After 401 or 402 nothing more is sent: the rest is skipped, and says why."""
    requests = prompts(10)
    requests[1]["prompt"] = f"[[sandbox:status={status}]] stops here"
    report = generate_batch(requests, credentials, store, max_in_flight=1, raise_on_failure=False)
    assert [row.status for row in report.rows] == ["generated", "failed"] + ["skipped"] * 8
    assert {row.error_type for row in report.rows[1:]} == {kind}
    assert sandbox.calls == 2


def test_duplicates_are_paid_once_and_delivered_under_each_name(store, shop, credentials, sandbox: Sandbox):
    """The same request twice in a batch is one call, one cached row, and two delivered files."""
    values = [{"name": "first"}, {"name": "second"}, {"name": "third"}]
    report = generate_batch(
        [prompts(1)[0]] * 3, credentials, store, deliver_to=shop, key="{name}.{ext}", values=values
    )
    assert [row.status for row in report.rows] == ["generated", "cached", "cached"]
    assert [row.delivered[0].uri for row in report.rows] == [shop.uri(f"{v['name']}.png") for v in values]
    assert sandbox.calls == 1


def test_input_errors_are_reported_together_and_cost_nothing(store, shop, credentials, sandbox: Sandbox):
    """All illegal requests of a list are named at once, before anything is sent."""
    requests = prompts(5)
    requests[1] |= {"size": "1x1"}
    requests[3] = {"prompt": "", "modle": "x"}
    with pytest.raises(IllegalBatchError) as caught:
        generate_batch(requests, credentials, store)
    assert "request 1: size is '1x1' for gpt-image-1" in str(caught.value)
    assert "did you mean model?" in str(caught.value)
    assert sandbox.calls == 0


def test_key_collisions_are_found_before_paying(store, shop, credentials, sandbox: Sandbox):
    """A template that puts two images under one key is refused; so is one with an unknown name."""
    with pytest.raises(IllegalBatchError, match="also that of another image"):
        generate_batch(prompts(2), credentials, store, deliver_to=shop, key="picture.{ext}")
    with pytest.raises(IllegalBatchError, match="also that of another image"):
        generate_batch(prompts(1, n=2), credentials, store, deliver_to=shop, key="{slug}.{ext}")
    with pytest.raises(IllegalBatchError, match="slug"):
        generate_batch(prompts(1), credentials, store, deliver_to=shop, key="{slugg}.{ext}")
    assert sandbox.calls == 0


def test_an_iterator_is_read_as_it_goes(store, credentials, sandbox: Sandbox):
    """A generator's illegal item is a failed row; the rest is generated."""
    requests = prompts(5)
    requests[2] = {"prompt": "x", "model": "gpt-image-9"}
    report = generate_batch(iter(requests), credentials, store, raise_on_failure=False)
    assert [row.status for row in report.rows] == [
        "generated",
        "generated",
        "failed",
        "generated",
        "generated",
    ]
    assert report.rows[2].given == requests[2]
    assert "gpt-image-9" in report.rows[2].error


def test_an_empty_batch_is_a_report_without_rows(store, credentials):
    """No requests: no rows, no failure."""
    report = generate_batch([], credentials, store)
    assert report.ok
    assert list(report.rows) == []


def test_a_budget_of_images_is_a_hard_limit(store, credentials, sandbox: Sandbox):
    """Images are reserved before sending; what does not fit is skipped; what is in the store costs nothing."""
    report = generate_batch(
        prompts(8, n=2), credentials, store, budget=Budget(images=7), max_in_flight=3, raise_on_failure=False
    )
    assert sandbox.images == 6
    assert [row.status for row in report.rows].count("skipped") == 5
    assert {row.error_type for row in report.rows if row.status == "skipped"} == {"BudgetExceeded"}
    rest = generate_batch(prompts(8, n=2), credentials, store, budget=Budget(images=10))
    assert (rest.totals.cached, rest.totals.generated) == (3, 5)
    assert sandbox.images == 16


def test_what_a_budget_left_over_is_no_failure(
    store, credentials, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
):
    """A budget that works ends the flow Completed, with a warning that says what is left; a failure is still one."""

    def bought(*requests: dict[str, object]) -> BatchReport:
        return generate_batch(requests, credentials, store, budget=Budget(images=1), max_in_flight=1)

    report = bought(*prompts(3))
    assert str(report) == report.summary
    assert (report.left_over, report.ok) == (2, False)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("The budget left over 2 requests of 3:")
    refused = {"prompt": "rust [[sandbox:moderation]]", "model": "gpt-image-1"}
    with pytest.raises(BatchError, match="1 x ModerationError, 2 x BudgetExceeded") as caught:
        bought(refused, *prompts(4))
    assert str(caught.value).count("\n") == 1  # what was left over is no example


def test_a_used_up_budget_still_finds_what_is_paid_for(store, credentials, sandbox: Sandbox):
    """With no budget at all a batch is served from the store as far as that goes."""
    generate_batch(prompts(3), credentials, store)
    report = generate_batch(prompts(5), credentials, store, budget=Budget(images=0), raise_on_failure=False)
    assert [row.status for row in report.rows] == ["cached"] * 3 + ["skipped"] * 2
    assert sandbox.calls == 3


@pytest.mark.parametrize("by", ["image", "tokens"])
def test_a_budget_in_usd_holds_with_eight_in_flight(
    store, credentials, sandbox: Sandbox, by: str, caplog: pytest.LogCaptureFixture
):
    """By the image it is never passed; by tokens by no more than one request was dearer than those before it."""
    price = Price(per_image=0.07) if by == "image" else Price(per_million_output_tokens=17)
    budget = Budget(usd=0.30, prices={"gpt-image-1": price})
    report = generate_batch(prompts(24), credentials, store, budget=budget, raise_on_failure=False)
    assert report.totals.generated == 4
    assert report.totals.usd == pytest.approx(sandbox.images * price.of(1, report.rows[0].usage))
    assert report.totals.usd <= 0.30
    assert report.notes == ()
    assert {row.error_type for row in report.rows if row.status == "skipped"} == {"BudgetExceeded"}
    again = generate_batch(prompts(24), credentials, store, budget=budget, raise_on_failure=False)
    assert (again.totals.cached, again.totals.generated) == (4, 4)


def test_a_first_request_that_is_dearer_than_all_that_is_left_is_named(
    store, credentials, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
):
    """Nothing goes beside it, and the report and one warning say by how much the limit was passed, and why."""
    report = generate_batch(prompts(9), credentials, store, budget=Budget(tokens=1), raise_on_failure=False)
    assert sandbox.calls == report.totals.generated == 1
    (note,) = report.notes
    assert note.endswith("tokens, the first")
    assert f"{report.totals.total_tokens - 1:,} over the limit of 1 tokens: one of gpt-image-1" in note
    assert [record.levelname for record in caplog.records if note in record.getMessage()] == ["WARNING"]


def test_what_has_no_price_is_refused_before_anything_is_sent(store, credentials, sandbox: Sandbox):
    """A model without a price could spend without end."""
    budget = Budget(usd=1.0, prices={"gpt-image-1": Price(per_image=0.5)})
    with pytest.raises(IllegalBatchError, match="price for dall-e-2"):
        generate_batch([{"prompt": "x"}], credentials, store, budget=budget)
    assert sandbox.calls == 0


@pytest.mark.parametrize("max_in_flight", [1, 4])
def test_what_a_lane_does_not_send_any_more_is_no_longer_reserved(
    store, credentials, sandbox: Sandbox, max_in_flight: int
):
    """A budget of tokens that is used up in the middle of lanes ends the batch: the rest is skipped."""
    report = generate_batch(
        prompts(24),
        credentials,
        store,
        budget=Budget(tokens=1, images=24),
        shard_size=6,
        max_in_flight=max_in_flight,
        raise_on_failure=False,
    )
    assert 1 <= report.totals.generated <= max_in_flight
    assert report.totals.skipped == 24 - report.totals.generated
    assert {row.error_type for row in report.rows if row.status == "skipped"} == {"BudgetExceeded"}


def test_a_lane_that_gets_its_worker_after_the_batch_was_left_sends_nothing(
    store, credentials, sandbox: Sandbox
):
    """Its requests' rows are written, as skipped."""
    item = Item(0, ImageRequest(prompt="too late", model="gpt-image-1"))

    @flow
    def late() -> object:
        plan = Plan("left", RunContext.current(), BatchOptions())
        return generate_lane.submit(Lane((item,), 1), credentials, store, plan).result()

    assert late() == [None]
    assert sandbox.calls == 0


def test_what_waited_for_its_turn_looks_at_the_budget_again(store, credentials, sandbox: Sandbox):
    """Requests that wait for the rate limit while others use the budget up are not sent."""
    report = generate_batch(
        prompts(8), credentials, store, budget=Budget(tokens=1), rate_limit=60, raise_on_failure=False
    )
    assert sandbox.calls == 1
    assert [row.error_type for row in report.rows].count("BudgetExceeded") == 7


def test_what_has_no_price_is_not_sent_on_a_budget_in_usd(store, credentials, sandbox: Sandbox):
    """In an iterator, too, a model without a price is refused: it could spend without end."""
    budget = Budget(usd=1.0, prices={"gpt-image-1": Price(per_image=0.1)})
    requests = iter([{"prompt": "x"}, *prompts(1)])
    report = generate_batch(requests, credentials, store, budget=budget, raise_on_failure=False)
    assert [row.status for row in report.rows] == ["failed", "generated"]
    assert "price for dall-e-2" in report.rows[0].error
    assert sandbox.calls == 1


def test_a_failed_delivery_keeps_the_image(store, shop, credentials, sandbox: Sandbox):
    """Where something else is at the key of what is paid for, the row fails with its images, and nothing is paid."""
    generate_batch(prompts(3), credentials, store)
    shop.write("tree-1.png", b"something else", "image/png")
    report = generate_batch(
        prompts(3), credentials, store, deliver_to=shop, key="{slug}.{ext}", raise_on_failure=False
    )
    failed = report.rows[1]
    assert (failed.status, failed.error_type, len(failed.images)) == ("failed", "KeyTakenError", 1)
    assert sandbox.calls == 3


def test_an_image_of_another_type_than_its_key_says_is_kept(store, shop):
    """A relay that gives a PNG where WebP was asked for: the row fails with the way out, its image is in the store."""
    body = json.dumps({"data": [{"b64_json": b64encode(png_of(8, 8)).decode()}]}).encode()

    class Relay(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Relay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        credentials = TTAPICredentials(api_key="k", base_url=f"http://127.0.0.1:{server.server_port}")
        report = generate_batch(
            prompts(1, output_format="webp"),
            credentials,
            store,
            deliver_to=shop,
            key="{slug}.webp",
            raise_on_failure=False,
        )
        server.shutdown()
    (row,) = report.rows
    assert (row.status, row.error_type, len(row.images), row.delivered) == (
        "failed",
        "KeyTemplateError",
        1,
        (),
    )
    assert row.error.endswith(
        "tree-0.webp ends in .webp, but the image is image/png: end the key template in .{ext}"
    )
    assert store.size(row.images[0].uri) == row.images[0].size_bytes


def test_nothing_is_sent_where_a_store_is_no_good(store, credentials, sandbox: Sandbox, tmp_path: Path):
    """An unwritable store raises before anything is sent, whatever `raise_on_failure` says."""
    (tmp_path / "file").write_text("in the way")
    bad = ImageStore(url=str(tmp_path / "file" / "below"))
    for stores in ({"store": bad}, {"store": store, "deliver_to": bad}):
        with pytest.raises(StoreError):
            generate_batch(prompts(2), credentials, raise_on_failure=False, **stores)
    assert sandbox.calls == 0


def test_where_answers_wait_is_in_the_summary(store, credentials, sandbox: Sandbox, tmp_path: Path):
    """A store that fails after paying: the last line and the artifact name the rescue folder, until it is empty."""
    store = store.model_copy(update={"patience": 0, "rescue_folder": str(tmp_path / "rescue")})
    store.check()
    (obstacle := Path(store.url) / "images").touch()
    report = generate_batch(prompts(2), credentials, store, raise_on_failure=False)
    assert report.rescue_folder is not None
    waiting = {path.name for path in Path(report.rescue_folder).iterdir()}
    assert waiting == {row.request_hash for row in report.rows}
    told = f"in the rescue folder {report.rescue_folder}, for the next run: 2 paid answers"
    assert report.summary.endswith(f"; {told}")
    assert told in unescape("".join(str(artifact.data) for artifact in artifacts(report)))
    obstacle.unlink()
    again = generate_batch(prompts(2), credentials, store)
    assert (again.rescued, again.rescue_folder, again.waiting) == (0, None, None)
    assert sandbox.calls == 2


def test_signed_addresses_are_in_artifacts_only(s3_server: S3Server, new_bucket, credentials):
    """Links that let anyone in are made for artifacts, with their end: result, manifest, ledger and page have none."""
    bucket = new_bucket()
    store, shop = (
        ImageStore(url=f"s3://{bucket}/{place}", signed_links=600, **s3_server.settings())
        for place in ("store", "shop")
    )
    report = generate_batch(prompts(1), credentials, store, deliver_to=shop, key="{slug}.{ext}")
    kept = [store.read(found.key) or b"" for found in store.list("") if not found.key.startswith("images/")]
    assert len(kept) >= 3
    told = [
        report.model_dump_json().encode(),
        *(row.model_dump_json().encode() for row in report.rows),
        *kept,
    ]
    assert [text for text in told if b"X-Amz-Signature" in text] == []
    shown = {each.key: unescape(f"{each.data} {each.description}") for each in artifacts(report)}
    signed = {key: text for key, text in shown.items() if "X-Amz-Signature" in text}
    assert signed.keys() == {"batch-batch"}
    assert [text for text in signed.values() if "Links are signed and end on" not in text] == []


def test_the_run_shows_progress_totals_and_images(store, credentials):
    """On the run: a progress artifact at 100 %, a markdown artifact with a gallery, a table with a row per image."""
    report = generate_batch(prompts(3, n=2), credentials, store)
    found = {artifact.type: artifact for artifact in artifacts(report)}
    assert {"progress", "markdown", "table"} <= found.keys()
    assert float(found["progress"].data) == 100
    assert found["markdown"].data.count("data:image/webp;base64,") == 6
    assert len(json.loads(found["table"].data)) == 6


def test_in_an_async_flow(store, credentials, sandbox: Sandbox):
    """The async twin gives the same report, with task runs and artifacts of its flow."""

    @flow
    async def asynchronous() -> BatchReport:
        return await agenerate_batch(prompts(4), credentials, store)

    report = asyncio.run(asynchronous())
    assert report.totals.generated == 4
    assert len(artifacts(report)) >= 3


def test_refresh_cache_pays_anew_once(store, credentials, sandbox: Sandbox):
    """With `refresh_cache` what this run did not pay for is paid anew, duplicates once."""
    generate_batch(prompts(2), credentials, store)
    report = generate_batch([*prompts(2), prompts(1)[0]], credentials, store, refresh_cache=True)
    assert [row.status for row in report.rows] == ["generated", "generated", "cached"]
    assert sandbox.calls == 4


def test_a_report_survives_pickling_without_the_stores_secret(store, credentials):
    """A persisted report has no store in it, and reads its rows all the same."""
    import pickle

    report = generate_batch(prompts(2), credentials, store)
    pickled = pickle.dumps(report)
    assert b"ImageStore" not in pickled
    assert [row.status for row in pickle.loads(pickled).rows] == ["generated", "generated"]


def test_a_single_request_is_no_batch(store, credentials):
    """A request or a mapping in place of an iterable of them is refused."""
    for single in (ImageRequest(prompt="x"), {"prompt": "x"}, "x"):
        with pytest.raises(IllegalBatchError, match="iterable"):
            generate_batch(single, credentials, store)


def test_renditions_are_delivered_beside_each_image(store, shop, credentials, sandbox: Sandbox):
    """A batch delivers versions under keys of their own; a second one finds them, and makes nothing again."""
    options = {"deliver_to": shop, "key": "{slug}/{rendition}.{ext}", "renditions": [{"max_size": 32}]}
    first = generate_batch(prompts(2), credentials, store, **options)
    assert [copy.uri.rpartition("/")[2] for copy in first.rows[0].delivered] == [
        "original.png",
        "webp-32.webp",
    ]
    again = generate_batch(prompts(2), credentials, store, **options)
    assert [row.delivered for row in again.rows] == [row.delivered for row in first.rows]
    with pytest.raises(IllegalBatchError, match=r"add \{rendition\}"):
        generate_batch(prompts(2), credentials, store, **{**options, "key": "{slug}.{ext}"})
    assert sandbox.calls == 2

    # a mark that is asked for later rewrites nothing; a third row's files get it
    marked = generate_batch(prompts(3), credentials, store, **options, provenance={"mark": "prompt"})
    assert [row.delivered for row in marked.rows[:2]] == [row.delivered for row in first.rows]
    assert [copy.marks for row in marked.rows for copy in row.delivered] == [
        *[(), ("xmp",)] * 2,
        ("xmp", "prompt"),
        ("xmp",),
    ]
    assert marked.totals.unmarked == 2
    assert marked.notes == (
        "2 delivered files were there before, without the mark or signature that is asked for; "
        "overwrite replaces what is there",
    )
    third = marked.rows[2]
    assert third.delivered[0].sha256 != third.images[0].sha256 == third.delivered[0].source_sha256
    with pytest.raises(IllegalBatchError, match="provenance: "):
        generate_batch(prompts(1), credentials, store, provenance={"marks": True})
    assert sandbox.calls == 3


def test_what_is_at_the_keys_is_known_before_paying(store, shop, credentials, sandbox: Sandbox):
    """A new store with an old place to deliver to pays for nothing that can't be delivered, unless told to replace."""
    names = ["tree-0", "tree-1", "new", "tree-0-again"]
    for name in names[:2]:
        shop.write(f"{name}.png", b"somebody else's", "image/png")

    def batch(**options: object) -> BatchReport:
        values = [{"name": name} for name in names]
        known = {"deliver_to": shop, "key": "{name}.{ext}", "raise_on_failure": False, "values": values}
        return generate_batch([*prompts(3), *prompts(1)], credentials, store, **known, **options)

    report = batch()
    assert [row.error_type for row in report.rows] == ["KeyTakenError", "KeyTakenError", None, None]
    assert f"nothing is sent: {shop.uri('tree-1.png')} holds something else" in (report.rows[1].error or "")
    assert sandbox.calls == report.totals.images == 2
    assert shop.read("tree-0.png") == b"somebody else's"
    replaced = batch(overwrite=True)
    assert replaced.ok
    assert shop.read_bytes(replaced.rows[1].delivered[0].uri) == store.read_bytes(
        replaced.rows[1].images[0].uri
    )
    assert sandbox.calls == 3


def test_what_is_refreshed_does_not_lose_its_key(store, shop, credentials, sandbox: Sandbox):
    """To pay anew for what is delivered already needs `overwrite`: else the new image could not be delivered."""
    options = {"deliver_to": shop, "key": "{slug}.{ext}", "raise_on_failure": False}
    request = [{"prompt": "a tree", "model": "gpt-image-1"}]
    assert generate_batch(request, credentials, store, **options).ok
    refused = generate_batch(request, credentials, store, refresh_cache=True, **options)
    (row,) = refused.rows
    assert row.error_type == "KeyTakenError"
    assert f"holds an earlier image of this request, from the store file://{store.url}" in (row.error or "")
    assert sandbox.calls == 1
    assert generate_batch(request, credentials, store, refresh_cache=True, overwrite=True, **options).ok
    assert sandbox.calls == 2


def test_a_broken_file_of_prompts_does_not_burn_its_calls(store, credentials, sandbox: Sandbox):
    """Failures of one kind in a row stop the batch; refused prompts never do."""
    refused = prompts(12, prompt="[[sandbox:moderation]] no")
    for number, request in enumerate(refused):
        request["variant"] = str(number)
    report = generate_batch(refused, credentials, store, breaker=3, raise_on_failure=False)
    assert report.totals.failed == 12
    broken = [request | {"prompt": "[[sandbox:status=400]] broken"} for request in refused]
    report = generate_batch(broken, credentials, store, breaker=3, max_in_flight=1, raise_on_failure=False)
    assert [row.status for row in report.rows] == ["failed"] * 3 + ["skipped"] * 9
    assert "3 requests in a row failed with InvalidRequestError" in report.rows[3].error
