"""Assets and events as Prefect gets them: what was delivered, what a batch is, and what others make of both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from prefect import flow, unmapped
from prefect.assets import materialize
from prefect.events import Event
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker

from prefect_ttapi import (
    DeliveredImage,
    ImageStore,
    InsufficientBalanceError,
    adeliver_images,
    agenerate_images,
    deliver_images,
    generate_batch,
    generate_images,
)
from prefect_ttapi.lineage.publishing import TRACKED, asset_at, batch_completed, materialise_batch
from prefect_ttapi.lineage.report import BatchReport, Totals

Told = Callable[[str], list[Event]]

MATERIALISED = "prefect.asset.materialization.succeeded"
REPORT = BatchReport(
    name="autumn",
    flow_run_id="5f0c1c1e-0000-4000-8000-000000000001",
    totals=Totals(rows=3, generated=2, failed=1, images=2),
    manifest_uri="s3://bucket/batches/5f0c1c1e/manifest.jsonl",
    gallery_uri="s3://bucket/batches/5f0c1c1e/index.html",
    seconds=1.5,
)


@pytest.fixture(scope="module")
def prefect_s_test_client(prefect_server: None) -> Iterator[None]:
    """Prefect's own client for tests in the place of the one that tells its server."""
    EventsWorker.set_client_override(AssertingEventsClient)
    try:
        yield
    finally:
        EventsWorker.instance().drain()
        EventsWorker.set_client_override(None)


@pytest.fixture
def told(prefect_s_test_client: None) -> Told:
    """The events of a kind that Prefect was told of during the test."""

    def so_far() -> list[Event]:
        EventsWorker.instance().wait_until_empty()
        return getattr(AssertingEventsClient.last, "events", [])  # none before it is entered

    so_far().clear()

    def events(kind: str) -> list[Event]:
        return [event for event in so_far() if event.event == kind]

    return events


def related(event: Event, role: str) -> set[str]:
    return {resource.id for resource in event.related if resource.role == role}


@pytest.mark.parametrize(
    ("uri", "legal"),
    [
        ("s3://bucket/shop/Größe~a+b=c.png", True),
        ("file:///srv/shop/a.png", True),
        ("file:///srv/my%20shop/a.png", False),
        ("s3://bucket/" + "x" * 500, True),
        ("s3://bucket/" + "x" * 501, False),
    ],
)
def test_what_prefect_takes_for_a_key(uri: str, legal: bool) -> None:
    """An address that Prefect takes for an asset's key is one, any other is none, and nothing is raised."""
    asset = asset_at(uri)
    assert (asset and asset.key) == (uri if legal else None)


def test_delivered_images_are_assets_and_events(
    store: ImageStore, shop: ImageStore, credentials, told: Told
) -> None:
    """Each delivered object is materialised with its facts, is upstream of the user's own asset, and is an event."""

    @materialize("s3://site/page.html")
    def page(images: list[DeliveredImage]) -> int:
        return len(images)

    @flow
    def site() -> list[DeliveredImage]:
        request = {"prompt": "a | <b>heron</b>", "model": "gpt-image-2", "n": 2}
        delivered = deliver_images(generate_images(request, credentials, store), shop)
        page(delivered)
        return delivered

    delivered = site()
    made = {event.resource.id: event for event in told(MATERIALISED)}
    uris = {copy.uri for copy in delivered}
    assert made.keys() == {*uris, "s3://site/page.html"}
    assert related(made["s3://site/page.html"], "asset") == uris
    images = {event.resource.id: event for event in told("ttapi.image.delivered")}
    assert images.keys() == uris
    for copy in delivered:
        assert made[copy.uri].payload == images[copy.uri].payload
        facts = images[copy.uri].payload
        assert facts["sha256"] == copy.sha256
        assert facts["source_uri"] == copy.source_uri
        assert facts["prompt"] == "a | <b>heron</b>"
        assert related(images[copy.uri], "task-run")


def test_in_async_flows(store: ImageStore, shop: ImageStore, credentials, told: Told) -> None:
    """The async twin's worker thread materialises the same, and so does a batch that ends in one."""

    @materialize("s3://site/page.html")
    async def page(report: BatchReport) -> None:
        """Made of a batch."""

    @flow
    async def site() -> str:
        generation = await agenerate_images({"prompt": "a heron"}, credentials, store)
        (delivered,) = await adeliver_images(generation, shop)
        await page(await asyncio.to_thread(materialise_batch, REPORT))
        return delivered.uri

    uri = asyncio.run(site())
    made = {event.resource.id: event for event in told(MATERIALISED)}
    assert made.keys() == {uri, REPORT.manifest_uri, "s3://site/page.html"}
    assert related(made["s3://site/page.html"], "asset") == {REPORT.manifest_uri}


def test_a_batch_is_one_asset_and_one_event(told: Told) -> None:
    """A batch's manifest is materialised with its totals; what takes the report is downstream of it."""

    @materialize("s3://site/report.html")
    def publish(report: BatchReport) -> str:
        return report.name

    @flow
    def nightly() -> bool:
        report = materialise_batch(REPORT)
        batch_completed(report)
        publish(report)
        return report is REPORT

    assert nightly()
    made = {event.resource.id: event for event in told(MATERIALISED)}
    assert related(made["s3://site/report.html"], "asset") == {REPORT.manifest_uri}
    (completed,) = told("ttapi.batch.completed")
    assert completed.payload == made[REPORT.manifest_uri].payload
    assert completed.payload["totals"]["generated"] == 2
    assert completed.resource["ttapi.ok"] == "false"
    assert related(completed, "flow-run")


def test_a_user_s_event_survives_many_deliveries(
    store: ImageStore, shop: ImageStore, credentials, told: Told
) -> None:
    """More deliveries than Prefect relates to one event: all are materialised, the first are linked, none is lost."""
    generation = generate_images({"prompt": "a heron", "n": 10}, credentials, store)

    @materialize("s3://site/page.html")
    def page(images: list[DeliveredImage]) -> None:
        """Made of all of them."""

    @flow
    def site() -> None:
        keys = [f"{number}/{{index}}.png" for number in range(11)]
        page(deliver_images.map(unmapped(generation), unmapped(shop), key=keys))

    site()
    made = {event.resource.id: event for event in told(MATERIALISED)}
    assert len(made) == 111
    assert len(related(made["s3://site/page.html"], "asset")) == TRACKED


def test_an_empty_account_is_told_once(store: ImageStore, credentials, told: Told) -> None:
    """However many tasks of a run meet it, under whatever status, one event tells of it; the next run tells again."""

    @flow
    def broke() -> None:
        for name in ("insufficient_quota", "no_credit", "status=402"):
            with pytest.raises(InsufficientBalanceError):
                generate_images({"prompt": f"[[sandbox:{name}]]"}, credentials, store)

    broke()
    broke()
    events = told("ttapi.balance.exhausted")
    assert len(events) == 2
    assert {event.resource.id for event in events} == {"ttapi.account.sandbox"}
    assert all(event.payload["message"] and related(event, "flow-run") for event in events)


def test_outside_a_run_nothing_is_told(told: Told) -> None:
    """Without a run there is nobody to tell: no task run, no event, no server started for it."""
    assert materialise_batch(REPORT) is REPORT
    batch_completed(REPORT)
    assert told(MATERIALISED) + told("ttapi.batch.completed") == []


def test_without_asset_contexts_images_are_delivered(
    store: ImageStore,
    shop: ImageStore,
    credentials,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a Prefect that keeps its assets elsewhere, delivering goes on with a warning, and its event is told."""
    generation = generate_images({"prompt": "a heron"}, credentials, store)
    monkeypatch.delattr("prefect.context.AssetContext")
    (delivered,) = deliver_images(generation, shop)
    assert told(MATERIALISED) == []
    assert [event.resource.id for event in told("ttapi.image.delivered")] == [delivered.uri]
    (warning,) = [record for record in caplog.records if "no assets of this run" in record.getMessage()]
    assert warning.levelname == "WARNING"


def test_a_batch_tells_of_itself(store: ImageStore, shop: ImageStore, credentials, told: Told) -> None:
    """A batch in a flow tells of each image that it delivers, of its end, and of its manifest as its one asset."""

    @flow
    def herons() -> BatchReport:
        requests = [{"prompt": f"heron {number}", "model": "gpt-image-1"} for number in range(2)]
        return generate_batch(
            requests, credentials, store, deliver_to=shop, key="{slug}.{ext}", thumbnails=False
        )

    report = herons()
    delivered = [event.resource.id for event in told("ttapi.image.delivered")]
    assert sorted(delivered) == [shop.uri(f"heron-{number}.png") for number in range(2)]
    (completed,) = told("ttapi.batch.completed")
    assert str(report.flow_run_id) in str(completed.related)
    assert (completed.resource["ttapi.ok"], completed.resource["ttapi.interrupted"]) == ("true", "false")
    assert [event.resource.id for event in told(MATERIALISED)] == [report.manifest_uri]


def test_an_interrupted_batch_tells_what_is_missing(store: ImageStore, credentials, told: Told) -> None:
    """A batch that does not come to its end has its event all the same, with what was made and what was not."""

    def source() -> Iterator[str]:
        yield from ("a heron", "a crane", "a stork")
        raise RuntimeError("the source broke")

    @flow
    def birds() -> None:
        generate_batch(source(), credentials, store, shard_size=2)

    with pytest.raises(RuntimeError, match="the source broke"):
        birds()
    (completed,) = told("ttapi.batch.completed")
    assert (completed.resource["ttapi.ok"], completed.resource["ttapi.interrupted"]) == ("false", "true")
    totals = completed.payload["totals"]
    assert totals["rows"] == 3
    assert totals["skipped"] == 3 - totals["generated"] > 0
