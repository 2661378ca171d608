"""What of a batch is paid for, told by listings and earlier manifests: no Prefect run is needed."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.batch import known as known_module
from prefect_ttapi.batch.items import Done, Intake, Item, row_of_paid
from prefect_ttapi.batch.known import Earlier, remember, sort_out
from prefect_ttapi.batch.options import BatchOptions, Plan
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.layout import latest_key
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import engine_of, run_of
from tests.support.meddling import meddling_proxy
from tests.support.rows import manifest_of
from tests.support.s3 import S3Server

DATE = datetime(2031, 5, 4, tzinfo=UTC)


def items(count: int) -> list[Item]:
    return [
        Item(number, ImageRequest(prompt=f"tree {number}", model="gpt-image-1")) for number in range(count)
    ]


def plan(not_before: datetime | None = None, **options: object) -> Plan:
    known = {"name": "campaign", "thumbnails": False}
    return Plan("b", run_of("r", date=DATE), BatchOptions(**known | options), not_before)


def paid_rows(
    store: ImageStore, client: TTAPIClient, count: int, shop: ImageStore | None = None
) -> list[Row]:
    """Rows of so many requests that an earlier run paid for, and perhaps delivered."""
    rows = []
    for item in items(count):
        paid = engine_of(store, client, "earlier").generate(item.request)
        row = row_of_paid(item, paid)
        if shop:
            delivery = plan(deliver_to=shop).options.delivery(DATE)
            copies = delivery.deliver(paid.generation, {})
            row = row.model_copy(update={"delivered": tuple(copies)})
        rows.append(row)
    return rows


def note(store: ImageStore, rows: list[Row], folder: str = "batches/one") -> None:
    """The earlier batch's manifest, noted for the next one."""
    store.write(f"{folder}/manifest.jsonl", manifest_of(rows), "application/x-ndjson")
    remember(store, "campaign", "sandbox", folder)


def sorted_out(store: ImageStore, asked: list[Item], with_plan: Plan | None = None) -> list[Item | Done]:
    hashes = frozenset(bytes.fromhex(item.request.request_hash) for item in asked)
    intake = Intake(iter(asked), len(asked), hashes)
    return list(sort_out(intake, Ledger(store, "sandbox", "now"), with_plan or plan(), Stop()))


def test_a_manifest_and_two_listings_tell_all(client, s3_server: S3Server, new_bucket):
    """What an earlier batch of the name made needs no look at any record or image; the rest is surely absent."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        store = ImageStore(url=f"s3://{new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        rows = paid_rows(store, client, 4)
        note(store, rows)
        before = len(proxy.seen)
        found = sorted_out(store, items(6))
        asked = Counter((method, "list-type" in path) for method, path in proxy.seen[before:])
    assert asked == {("GET", True): 2, ("GET", False): 2}
    assert [done.row.images for done in found[:4]] == [row.images for row in rows]
    assert {done.row.status for done in found[:4]} == {"cached"}
    assert sum(done.row.api_calls for done in found[:4]) == 0
    assert [item.known_absent for item in found[4:]] == [True, True]


def test_without_a_manifest_the_records_tell(store, client):
    """Records that no manifest knows are read, and say the same."""
    rows = paid_rows(store, client, 3)
    found = sorted_out(store, items(3))
    assert [done.row.images for done in found] == [row.images for row in rows]
    assert [done.row.row for done in found] == [0, 1, 2]


@pytest.mark.parametrize("lie", ["tag", "image"])
def test_a_row_is_trusted_only_where_all_it_says_still_stands(store, client, lie: str):
    """A record written since is read anew; where an image is gone the request is to be sent again."""
    (row,) = paid_rows(store, client, 1)
    if lie == "tag":
        wrong = row.model_copy(update={"ledger_tag": "older", "images": ()})
        note(store, [wrong])
        (found,) = sorted_out(store, items(1))
        assert isinstance(found, Done)
        assert found.row.images == row.images
    else:
        note(store, [row])
        store.remove(store.objects.key(row.images[0].uri))
        (found,) = sorted_out(store, items(1))
        assert isinstance(found, Item)


def test_a_hostile_or_torn_manifest_tells_nothing(store, client):
    """Lines that are no rows, another request's row under a hash, a folder outside: the records are read instead."""
    rows = paid_rows(store, client, 2)
    swapped = rows[0].model_copy(update={"request_hash": rows[1].request_hash, "ledger_tag": "x"})
    lines = swapped.line() + b'{"row":1,"status":"cached","request_hash":"' + b"a" * 64
    store.write("batches/one/manifest.jsonl", lines, "application/x-ndjson")
    remember(store, "campaign", "sandbox", "batches/one")
    found = sorted_out(store, items(2))
    assert [done.row.images for done in found] == [row.images for row in rows]
    store.write(latest_key("campaign", "sandbox"), b'{"folders": ["../elsewhere", 7]}', "application/json")
    assert len(sorted_out(store, items(2))) == 2


def test_copies_that_stand_need_no_task_run(store, shop, client):
    """A delivered copy that a listing still shows is delivered; one that was replaced or removed is delivered again."""
    rows = paid_rows(store, client, 3, shop)
    note(store, rows)
    shop.remove(shop.objects.key(rows[1].delivered[0].uri))
    shop.write(shop.objects.key(rows[2].delivered[0].uri), b"something else", "image/png")
    found = sorted_out(store, items(3), plan(deliver_to=shop))
    assert isinstance(found[0], Done)
    assert found[0].row.delivered == rows[0].delivered
    assert [type(item) for item in found[1:]] == [Item, Item]
    renamed = sorted_out(store, items(1), plan(deliver_to=shop, key="{index}-{hash}.{ext}"))
    assert isinstance(renamed[0], Item)


def test_one_listing_tells_which_keys_are_taken(store, s3_server: S3Server, new_bucket):
    """Of what has no record, the rows that could not be delivered are refused, and the others need no look."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        shop = ImageStore(url=f"s3://{new_bucket()}/shop", **s3_server.settings(endpoint_url=proxy.url))
        s3_server.fill(shop.url.split("/")[2], (f"shop/2030/{number}.png" for number in range(2_000)))
        options = plan(deliver_to=shop, key="{date:%Y}/{slug}-{size}.{ext}")
        shop.write("2031/tree-1-1024x1024.png", b"something else", "image/png")
        shop.write("2031/tree-2-1024x1024.webp", b"another type", "image/webp")
        before = len(proxy.seen)
        found = sorted_out(store, items(40), options)
        asked = Counter((method, "list-type" in path) for method, path in proxy.seen[before:])
    assert asked == {("GET", True): 1, ("HEAD", False): 1}
    assert [number for number, one in enumerate(found) if isinstance(one, Done)] == [1]
    assert (found[1].row.status, found[1].row.error_type) == ("failed", "KeyTakenError")
    assert {item.keys_free for item in found if isinstance(item, Item)} == {True}


def test_where_the_keys_can_not_be_listed_each_is_looked_at(store, shop, client):
    """A place with too many objects, or a request that was paid for since: its lane finds out."""
    options = plan(deliver_to=shop, key="{slug}.{ext}")
    for number in range(1_001):
        (shop_folder := Path(shop.url)).mkdir(exist_ok=True)
        (shop_folder / f"{number}.png").touch()
    (found,) = sorted_out(store, items(1), options)
    assert (found.known_absent, found.keys_free) == (True, False)


def test_a_key_that_was_delivered_to_since_is_no_obstacle(store, shop, client, monkeypatch):
    """Another run may record and deliver between two listings: the record is asked for once more."""
    (item,) = items(1)
    options = plan(deliver_to=shop, key="{slug}.{ext}")
    listed = known_module.listing

    def deliver_after(place: ImageStore, *arguments: object, **more: object) -> known_module.Listing:
        found = listed(place, *arguments, **more)
        if place == store and not found.objects:
            paid = engine_of(store, client, "other").generate(item.request)
            options.options.delivery(DATE).deliver(paid.generation, {})
        return found

    monkeypatch.setattr(known_module, "listing", deliver_after)
    (found,) = sorted_out(store, [item], options)
    assert isinstance(found, Item)


@pytest.mark.parametrize(("age", "kind"), [(timedelta(hours=1), Done), (timedelta(0), Item)])
def test_expired_rows_are_left_to_the_ledger(store, client, age: timedelta, kind: type):
    """A row that is young enough counts; an older one is for its lane to ask the ledger about, which may pay anew."""
    rows = paid_rows(store, client, 1)
    note(store, rows)
    (found,) = sorted_out(store, items(1), plan(not_before=datetime.now(UTC) - age))
    assert isinstance(found, kind)
    note(store, [rows[0].model_copy(update={"created_at": datetime(2031, 1, 1)})])
    assert isinstance(sorted_out(store, items(1), plan(not_before=DATE))[0], Item)


def test_a_huge_store_is_not_listed_to_its_end(client, s3_server: S3Server, new_bucket):
    """Where other requests' records are many, listing ends early, and each request is looked up by itself."""
    bucket = new_bucket()
    store = ImageStore(url=f"s3://{bucket}", **s3_server.settings())
    paid_rows(store, client, 1)
    s3_server.fill(bucket, (f"ledger/sandbox/{number:064x}.json" for number in range(3_000)))
    found = sorted_out(store, items(2))
    assert [type(item) for item in found] == [Item, Item]
    assert not any(item.known_absent for item in found)
    stop = Stop()
    assert known_module.listing(store, "ledger/", 4_000, stop).complete
    stop.cancel("enough")
    stopped = known_module.listing(store, "ledger/", 4_000, stop)
    assert (stopped.objects, stopped.complete) == ({}, False)


def test_who_may_not_list_looks_up(client, s3_server: S3Server, new_bucket):
    """A store that refuses to be listed is asked request by request."""

    def refuse(method: str, path: str, headers: dict[str, str]) -> int | None:
        return 403 if "list-type" in path else None

    with meddling_proxy(s3_server.url, refuse) as proxy:
        store = ImageStore(url=f"s3://{new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        paid_rows(store, client, 1)
        assert [type(item) for item in sorted_out(store, items(1))] == [Item]


def test_the_last_manifests_of_a_name_are_kept(store, client):
    """A run with a part of the requests hides nothing that the one before it made; what is gone is left out."""
    rows = paid_rows(store, client, 2)
    note(store, rows, "batches/whole")
    note(store, rows[:1], "batches/part")
    note(store, rows[:1], "batches/gone")
    store.remove("batches/gone/manifest.jsonl")
    wanted = {bytes.fromhex(row.request_hash) for row in rows}
    with closing(Earlier(store, "campaign", "sandbox", wanted, thumbnails=False)) as earlier:
        assert [earlier.row(row.request_hash) for row in rows] == rows
    with closing(Earlier(store, "other", "sandbox", wanted, thumbnails=False)) as earlier:
        assert earlier.row(rows[0].request_hash) is None
