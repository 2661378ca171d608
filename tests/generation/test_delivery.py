"""Copies of stored images under the names their consumers know."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.batch.items import Done, Item, Work
from prefect_ttapi.batch.options import BatchOptions
from prefect_ttapi.errors import ImageMissingError, KeyTakenError, StoreError
from prefect_ttapi.generation.budget import Budget, Spending
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.generation.files import Place
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.images.renditions import Rendition
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import engine_of
from tests.support.generations import deliver, fresh_image, generation_of, request_of, sha256, stored
from tests.support.meddling import meddling_proxy
from tests.support.rows import picture
from tests.support.s3 import S3Server

KEY = "2031/05/a-lighthouse.png"


@pytest.fixture
def store(each_store: ImageStore) -> ImageStore:
    """The test runs on each kind of store."""
    return each_store


@pytest.fixture(params=["folder", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path, s3_server: S3Server) -> ImageStore:
    """Where to deliver to: another folder, or another bucket of the same service."""
    if request.param == "folder":
        return ImageStore(url=str(tmp_path / "published"), public_base_url="https://cdn.example.com/x/")
    return ImageStore(
        url=f"s3://{s3_server.new_bucket()}/published",
        public_base_url="https://cdn.example.com/x/",
        cache_control="max-age=60",
        **s3_server.settings(),
    )


def test_a_copy_is_a_copy(store: ImageStore, target: ImageStore) -> None:
    """From any kind of store to any other, the copy has the bytes, and tells its source and public address."""
    image = stored(store)
    delivered = deliver(target, image, KEY, store, {"model": "dall-e-2"})
    assert target.read_bytes(delivered.uri) == b"pixels"
    assert delivered.uri == target.uri(KEY)
    assert delivered.url == f"https://cdn.example.com/x/{KEY}"
    assert (delivered.sha256, delivered.source_uri) == (image.sha256, image.uri)
    # a listing tells that the copy stands
    assert [(found.tag, found.size) for found in target.list("")] == [(delivered.etag, delivered.size_bytes)]


def test_within_one_store(store: ImageStore) -> None:
    """The target may be the store itself; without a public address there is no link."""
    image = stored(store)
    delivered = deliver(store, image, KEY)
    assert store.read_bytes(delivered.uri) == b"pixels"
    assert delivered.url is None


def test_the_source_need_not_be_named_where_the_target_can_read_it(
    s3_server: S3Server, tmp_path: Path
) -> None:
    """With the same credentials another bucket is read, and from a folder another folder."""
    settings = s3_server.settings()
    pairs = [
        (
            ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings),
            ImageStore(url=f"s3://{s3_server.new_bucket()}/out", **settings),
        ),
        (ImageStore(url=str(tmp_path / "in images")), ImageStore(url=str(tmp_path / "out"))),
    ]
    for source, target in pairs:
        assert target.read_bytes(deliver(target, stored(source), KEY).uri) == b"pixels"
    folder = pairs[1][1]
    with pytest.raises(StoreError, match="name the store it came from"):
        deliver(folder, stored(pairs[0][0]), "other.png")


def test_a_second_delivery_is_a_success(store: ImageStore, target: ImageStore) -> None:
    """The same image under the same key again changes nothing and succeeds: each step can be repeated."""
    image = stored(store)
    assert deliver(target, image, KEY, store) == deliver(target, image, KEY, store)


def test_another_object_is_not_overwritten(store: ImageStore, target: ImageStore) -> None:
    """A key that holds something else is refused by name, whatever its size, unless overwriting is asked for."""
    image = stored(store)
    for other in (b"other!", b"something of another length"):
        target.write(KEY, other, "image/png")
        with pytest.raises(StoreError, match=r"a-lighthouse\.png holds something else.*overwrite=True"):
            deliver(target, image, KEY, store)
        assert target.read(KEY) == other
        deliver(target, image, KEY, store, overwrite=True)
        assert target.read(KEY) == b"pixels"


def test_equal_bytes_from_elsewhere_are_a_success(store: ImageStore, target: ImageStore) -> None:
    """An object that somebody else put there, without our metadata, counts if its bytes are the same."""
    target.write(KEY, b"pixels", "image/png")
    assert deliver(target, stored(store), KEY, store).sha256 == sha256(b"pixels")


def test_missing_and_damaged_images_are_not_delivered(store: ImageStore, tmp_path: Path) -> None:
    """What is gone, or has other bytes than recorded, never reaches the target."""
    target = ImageStore(url=str(tmp_path / "published"))
    image = stored(store)
    store.write(store.objects.key(image.uri), b"pixelz", "image/png")
    with pytest.raises(StoreError, match="damaged"):
        deliver(target, image, KEY, store)
    gone = image.model_copy(update={"uri": store.uri("images/" + "0" * 64 + ".png")})
    with pytest.raises(ImageMissingError):
        deliver(target, gone, KEY, store)
    assert target.read(KEY) is None


def test_a_missing_image_is_noticed_by_the_service_that_copies(s3_server: S3Server) -> None:
    """Also where the bytes never pass through here, a missing source is a missing image."""
    source = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings())
    gone = stored(source).model_copy(update={"uri": source.uri("images/" + "0" * 64 + ".png")})
    with pytest.raises(ImageMissingError):
        deliver(source, gone, KEY, source)


def test_one_service_copies_by_itself(s3_server: S3Server) -> None:
    """Between buckets of one service and account no image passes through this machine, and the copy is described."""
    bucket = s3_server.new_bucket()
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url)
        source = ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings)
        target = ImageStore(url=f"s3://{bucket}", cache_control="max-age=60", **settings)
        image = stored(source, b"pixels", "image/webp")
        proxy.seen.clear()
        deliver(target, image, "a.webp", source, {"model": "gpt-image-2"})
        assert [method for method, _ in proxy.seen] == ["HEAD", "PUT", "HEAD"]
    client = s3_server.client()
    head = client.head_object(Bucket=bucket, Key="a.webp")
    client.close()
    assert (head["ContentType"], head["CacheControl"]) == ("image/webp", "max-age=60")
    assert head["Metadata"] == {"model": "gpt-image-2", "sha256": image.sha256}


def test_another_service_is_not_asked_to_copy(s3_server: S3Server) -> None:
    """Where the source has another endpoint or key than the target, the bytes are read with the source's own."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        source = ImageStore(
            url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url)
        )
        target = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings())
        image = stored(source)
        proxy.seen.clear()
        deliver(target, image, KEY, source)
        assert [method for method, _ in proxy.seen] == ["GET"]


def test_what_is_needed_of_an_image_is_read_once(s3_server: S3Server, shop: ImageStore) -> None:
    """A copy, a rendition and a look at an image in another place fetch it once; not at all where it is at hand."""
    data = picture()
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url)
        source = ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings)
        image = stored(source, data)
        delivery = Delivery(shop, "{index}", "batch", datetime.now(UTC), source=source)
        for number, fresh in enumerate(([], [fresh_image(data)])):
            (original,) = delivery.originals(generation_of(request_of(), image), fresh)
            proxy.seen.clear()
            (copy,) = delivery.put(original, [Place(image, None, f"{number}.png")], {})
            small = Place(image, Rendition(max_size=16), f"{number}-small.webp")
            (rendition,) = delivery.put(original, [small], {})
            with original.fetch()() as reader:
                assert reader.read() == data
            assert [method for method, _ in proxy.seen] == ([] if fresh else ["GET"])
            assert (copy.sha256, rendition.source_uri) == (image.sha256, image.uri)


def test_a_cut_image_is_noticed_by_the_service_that_copies(s3_server: S3Server) -> None:
    """Also where the bytes never pass through here, an image that was cut short leaves no copy."""
    source = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings())
    image = stored(source)
    source.write(source.objects.key(image.uri), b"pix", "image/png")
    with pytest.raises(StoreError, match="damaged: it has 3 bytes, not 6"):
        deliver(source, image, KEY, source)
    assert source.size(KEY) is None


@pytest.mark.parametrize("trouble", [503, "lose the answer"])
def test_a_lost_answer_is_settled_by_looking(
    s3_server: S3Server, folder_store: ImageStore, trouble: str | int
) -> None:
    """A delivery whose answer is lost succeeds once, whether or not the object had been written."""
    orders = [trouble]
    with meddling_proxy(
        s3_server.url, lambda method, *_: orders.pop() if method == "PUT" and orders else None
    ) as proxy:
        target = ImageStore(
            url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url)
        )
        delivered = deliver(target, stored(folder_store), KEY, folder_store)
        assert not orders
        assert target.read_bytes(delivered.uri) == b"pixels"


@pytest.mark.parametrize("key", ["/etc/x.png", "../x.png", "a/../../x.png", "a\nb.png", ""])
def test_hostile_keys_are_refused(store: ImageStore, key: str) -> None:
    """Nothing is delivered outside the target."""
    with pytest.raises(StoreError, match="can't be used"):
        deliver(store, stored(store), key)


@pytest.mark.parametrize("size", ["1024x1024", "auto"])
def test_a_key_is_looked_at_before_paying(target: ImageStore, size: str) -> None:
    """What is at a key that an image may get is told by its metadata; other sizes and types are no obstacle."""
    request = request_of().model_copy(update={"model": "gpt-image-1", "size": size})
    delivery = Delivery(target, "shop/{slug}-{size}.{ext}", "batch", datetime.now(UTC))
    keys = delivery.keys(request, {})
    slug = keys.likely()[0].rpartition("-")[0]
    for other in (
        f"{slug}-1024x1024.webp",
        f"{slug}-large.png",
        *([f"{slug}-512x512.png"] * (size != "auto")),
    ):
        target.write(other, b"something else", "image/png")
    delivery.check_free(keys)
    target.write(f"{slug}-1024x1024.png", b"something else", "image/png")
    with pytest.raises(
        KeyTakenError, match=r"nothing is sent: .*-1024x1024\.png holds something else: deliver"
    ):
        delivery.check_free(keys)


def test_what_was_not_listed_is_looked_at_before_it_is_sent(
    folder_store: ImageStore, shop: ImageStore, client: TTAPIClient, sandbox: Sandbox
) -> None:
    """A request of a batch whose key is taken is not sent, and its claim and its money are free again."""
    request = request_of()
    spending = Spending(Budget(images=1))
    assert spending.reserve(request) is None
    engine = engine_of(folder_store, client, limits=Limits(spending=spending))
    work = Work(engine, BatchOptions(), Delivery(shop, "{slug}.png", "batch", datetime.now(UTC)))
    (key,) = work.delivery.keys(request, {}).likely()
    shop.write(key, b"something else", "image/png")
    done = work.outcome(Item(0, request), None)
    assert isinstance(done, Done)
    assert (done.row.status, done.row.error_type, done.images_paid) == ("failed", "KeyTakenError", 0)
    assert (sandbox.calls, spending.reserved, spending.spent.images) == (0, 0, 0)
    shop.remove(key)
    assert spending.reserve(request) is None
    done = work.outcome(Item(0, request), None)
    assert isinstance(done, Done)
    assert [copy.uri for copy in done.row.delivered] == [shop.uri(key)]
    assert sandbox.calls == 1
