"""Stores as they are: with each quirk the whole way goes well, or one line says why not before anything is paid."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from prefect_ttapi.errors import KeyTakenError, StoreError
from prefect_ttapi.generation.delivery import TRIED
from prefect_ttapi.images.renditions import Rendition
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import (
    API,
    deliver,
    delivery_to,
    fresh_image,
    generation_of,
    request_of,
    stored,
)
from tests.support.ledgers import acquire, recorded
from tests.support.marked import delivery_of, made_in
from tests.support.quirks import QUIRKS, QuirkyServer, quirky_server
from tests.support.rows import picture
from tests.support.s3 import S3Server

UPLOAD = {"tags": {"campaign": "May + June"}, "content_disposition": "attachment"}

NO_CONDITIONS = "this store has no conditional writes"

#: What can't be used at all, and how the line goes on.
UNUSABLE = {
    "no ETag at all": "has no ETag: use a service",
    "another region: 301": "the bucket is in the region eu-west-3: set the store's region",
    "another region: 400": "the bucket is in the region eu-west-3: set the store's region",
    "what is missing is forbidden": "s3:ListBucket, without which what is missing is forbidden",
    "requesters pay": "buckets whose requesters pay can't be used",
    "a page for an answer": "has no ETag",
}
#: What can't elect one payer.
NO_LEDGER = {
    "conditions: 501": "(it answers NotImplemented, HTTP 501)",
    "conditions: 400 InvalidArgument": "(it answers InvalidArgument, HTTP 400)",
    "conditions: 400 NotImplemented": "(it answers NotImplemented, HTTP 400)",
    "conditions: 304 for 412": "(it answers 304, HTTP 304)",
    "conditions ignored": "(it creates an object twice)",
    "If-Match ignored": "(it ignores If-Match)",
}
#: What can't have tags.
NO_TAGS = {
    "PutObjectTagging unknown": "can't put upload.tags on s3://",
    "x-amz-tagging unknown": "this service can't do it: leave out what its documentation doesn't list",
}


@pytest.fixture(scope="module")
def quirky(s3_server: S3Server) -> Iterator[QuirkyServer]:
    with quirky_server(s3_server) as quirky:
        yield quirky


def refusal(check: object) -> str:
    with pytest.raises(StoreError) as refused:
        check()  # type: ignore[operator]
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("quirk", QUIRKS)
def test_a_store_does_all_that_is_needed_or_says_why_not(quirky: QuirkyServer, quirk: str) -> None:
    """After a check that passes all goes well: claim, renewal, image, record, look-up, listing."""
    store = quirky.store(quirk)
    if line := UNUSABLE.get(quirk) or NO_LEDGER.get(quirk):
        told = refusal(store.check)
        assert line in told
        assert quirk in UNUSABLE or (NO_CONDITIONS in told and "use one that has them" in told)
        return
    store.check()
    request = request_of(quirk)
    ledger = Ledger(store, API, "one run")
    with store.before_paying():
        claim = acquire(ledger, request.request_hash)
    assert isinstance(claim, Claim)
    with claim:
        claim.renew()
        claim.before_sending()
        image = store.put_image(fresh_image(b"pixels"), {"model": "dall-e-2"})
        recorded(claim, generation_of(request, image))
    record = ledger.look_up(request.request_hash)
    assert record is not None
    assert store.read_bytes(record.generation.images[0].uri) == b"pixels"
    assert store.size(image.uri) == 6
    listed = {found.key for found in store.list("")}
    assert listed == {
        ledger.documents.key(request.request_hash),
        "ledger/probe.json",
        store.objects.key(image.uri),
    }


@pytest.mark.parametrize("quirk", QUIRKS)
def test_a_place_takes_deliveries_or_says_why_not(
    quirky: QuirkyServer, quirk: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a check that passes, an image is delivered by upload and by copy, and nobody else's is overwritten."""
    shop = quirky.store(quirk, upload=UPLOAD)
    if line := UNUSABLE.get(quirk) or NO_TAGS.get(quirk):
        assert line in refusal(delivery_to(shop).check)
        return
    delivery_to(shop).check()
    assert shop.read(TRIED) is None
    for number, place in enumerate((shop, quirky.plain(shop))):
        image = stored(place, b"pixels")
        for _ in range(2):
            copy = deliver(shop, image, f"{number}.png", place)
            assert (copy.sha256, shop.read(f"{number}.png")) == (image.sha256, b"pixels")
    with pytest.raises(StoreError, match=r"0\.png holds something else"):
        deliver(shop, stored(shop, b"other"), "0.png")
    warned = [record for record in caplog.records if "no conditional writes there" in record.getMessage()]
    assert len(warned) == (1 if quirk in NO_LEDGER and quirk != "If-Match ignored" else 0)
    client = quirky.server.client()
    bucket, _, prefix = shop.url.removeprefix("s3://").partition("/")
    for number in range(2):
        tags = client.get_object_tagging(Bucket=bucket, Key=f"{prefix}/{number}.png")["TagSet"]
        assert tags == [{"Key": "campaign", "Value": "May + June"}]
    client.close()


@pytest.mark.parametrize("quirk", NO_LEDGER)
def test_no_rendition_replaces_what_is_not_ours(quirky: QuirkyServer, quirk: str) -> None:
    """Also where there are no conditional writes; what overwrites is asked to."""
    shop = quirky.store(quirk)
    delivery = delivery_of(shop, [Rendition(max_size=16)])
    delivery.check()
    shop.write("webp-16", b"something else", "image/webp")
    made = made_in(shop, picture())
    with pytest.raises(KeyTakenError, match="webp-16 holds something else"):
        delivery.deliver(made, {})
    assert shop.read("webp-16") == b"something else"
    replace(delivery, overwrite=True).deliver(made, {})
    assert shop.read("webp-16") != b"something else"


def test_a_place_without_tags_will_do_where_none_are_asked_for(quirky: QuirkyServer) -> None:
    """What is not asked for is not tried."""
    for quirk in NO_TAGS:
        shop = quirky.store(quirk)
        delivery_to(shop).check()


def test_the_write_that_is_tried_is_that_of_deliveries(quirky: QuirkyServer) -> None:
    """Type, cache control, disposition, tags, ACL, class, encryption, metadata, MD5 and condition are the same."""
    sent: list[dict[str, str]] = []
    upload = UPLOAD | {"acl": "private", "storage_class": "STANDARD_IA", "encryption": "AES256"}
    shop = quirky.store(upload=upload, cache_control="max-age=60")
    plain = quirky.proxy.meddle

    def note(method: str, path: str, headers: dict[str, str]) -> object:
        if method == "PUT" and "?" not in path:
            sent.append({name.lower(): value for name, value in headers.items()})
        return plain(method, path, headers)

    quirky.proxy.meddle = note
    delivery_to(shop).check()
    tried, _ = sent
    image = stored(quirky.plain(shop))
    deliver(shop, image, "a.png", quirky.plain(shop))
    delivered = sent[-1]
    its_own = {
        "content-length",
        "content-md5",
        "authorization",
        "amz-sdk-invocation-id",
        "x-amz-content-sha256",
    }
    its_own |= {"x-amz-date", "x-amz-meta-sha256", "content-disposition", "expect"}
    assert tried.keys() - {"expect"} == delivered.keys() - {"expect"}
    assert {name: tried[name] for name in tried.keys() - its_own} == {
        name: delivered[name] for name in delivered.keys() - its_own
    }
    assert tried["if-none-match"] == "*"


def test_what_can_not_be_removed_is_replaced_the_next_time(quirky: QuirkyServer) -> None:
    """Who may not delete keeps one small object, however often the place is checked."""
    shop = quirky.store()
    quirky.proxy.meddle = lambda method, *_: 403 if method == "DELETE" else None
    for _ in range(2):
        delivery_to(shop).check()
    assert [found.key for found in shop.list("")] == [TRIED]


def test_a_setting_that_images_alone_have_is_found_by_the_check(quirky: QuirkyServer) -> None:
    """A storage class that the service doesn't know is told by the store's check, not by the first paid image."""
    store = quirky.store(upload={"storage_class": "FROSTY"})
    assert "correct upload.storage_class" in refusal(store.check)


def test_long_listings_go_on_without_tokens_or_are_an_error(quirky: QuirkyServer) -> None:
    """Without a token the next page starts after the last key; where it doesn't, that is an error."""
    bucket = quirky.server.new_bucket()
    quirky.server.fill(bucket, (f"größe/ledger/{number:04d}" for number in range(1005)))
    url = f"s3://{bucket}/größe"
    whole = [f"ledger/{number:04d}" for number in range(1005)]
    for quirk in ("listing without token", "listing encoded silently"):
        store = quirky.store(quirk, url=url)
        assert [found.key for found in store.list("")] == whole
    store = quirky.store("listing without token or start-after", url=url)
    listing = store.list("ledger/")
    assert [next(listing).key for _ in range(1000)] == whole[:1000]
    assert "can't list" in refusal(lambda: next(listing))


def test_a_document_without_its_tag_is_never_written_over_unseen(quirky: QuirkyServer) -> None:
    """Where a write's answer has no tag, the tag of what somebody else has written since is not taken for its own."""
    store = quirky.store("PUT without ETag")
    other = quirky.plain(store)
    plain = quirky.proxy.meddle

    def faster(method: str, path: str, headers: dict[str, str]) -> object:
        if method in ("GET", "HEAD"):
            other.write("ledger/a.json", b"theirs", "application/json")
        return plain(method, path, headers)

    quirky.proxy.meddle = faster
    assert "something else than was sent" in refusal(
        lambda: store.compare_and_swap("ledger/a.json", b"ours", None)
    )


def test_a_document_that_only_a_look_misses_counts_as_there(quirky: QuirkyServer) -> None:
    """Where its bytes come without a tag, and a look says that there is nothing, it may not be paid for again."""
    store = quirky.store("GET without ETag")
    quirky.plain(store).write("ledger/a.json", b"paid", "application/json")
    plain = quirky.proxy.meddle
    quirky.proxy.meddle = lambda method, *rest: 404 if method == "HEAD" else plain(method, *rest)
    assert "not as expected" in refusal(lambda: store.read("ledger/a.json"))


@pytest.mark.parametrize("quirk", ["SlowDown at first", "429 at first"])
def test_patience_before_paying_is_an_option(quirky: QuirkyServer, quirk: str) -> None:
    """A store that is too busy is waited for as long as the option says, for checks of both kinds."""
    for number in range(2):
        store = quirky.store(quirk, patience_before=0)
        told = refusal((store.check, delivery_to(store).check)[number])
        assert re.search(r"\((SlowDown, HTTP 503|429, HTTP 429)\)", told)
        assert len(quirky.proxy.seen) == 1
    assert ImageStore(url="s3://pictures").patience_before == 60


def test_a_wait_that_gets_long_is_told(quirky: QuirkyServer, caplog: pytest.LogCaptureFixture) -> None:
    """One warning says what is waited for, and for how long."""
    store = quirky.store("SlowDown at first")
    store.check()
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert re.search(
        r"can't read s3://.*: the service is too busy \(SlowDown, HTTP 503\); asked again for 60 s", told
    )


def test_a_stop_ends_the_wait_for_a_store(quirky: QuirkyServer) -> None:
    """Who stops a batch while the store is busy waits no longer."""
    stop = Stop()
    store = quirky.store()
    quirky.proxy.meddle = lambda *_: 503
    threading.Timer(0.3, stop.set, ["Ctrl-C"]).start()
    started = time.monotonic()
    with pytest.raises(StopSending, match="Ctrl-C"), store.before_paying(stop):
        store.check()
    assert time.monotonic() - started < 2
