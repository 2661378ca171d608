"""Renditions under the names their consumers know."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from PIL import Image

from prefect_ttapi import Rendition
from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.cli.checks import verify
from prefect_ttapi.errors import KeyTemplateError, StoreError
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.images.renditions import versions_of
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import DeliveredImage, Generation
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.objects import Facts
from prefect_ttapi.storage.store import ImageStore
from tests.support.engines import engine_of
from tests.support.generations import fresh_image, generation_of
from tests.support.hostile import HostileServer, answer, answered
from tests.support.meddling import meddling_proxy
from tests.support.pictures import saved
from tests.support.s3 import S3Server

WHEN = datetime(2031, 5, 4, tzinfo=UTC)
REQUEST = ImageRequest(prompt="a lighthouse", model="gpt-image-2", n=2)
RENDITIONS = [Rendition(max_size=32), Rendition(format="jpeg", max_size=16, name="thumb")]


@pytest.fixture
def store(each_store: ImageStore) -> ImageStore:
    """The test runs on each kind of store."""
    return each_store


def made_in(store: ImageStore) -> Generation:
    """Two pictures of 64 x 48."""
    images = []
    for index, colour in enumerate(["red", "green"]):
        data = saved(Image.new("RGB", (64, 48), colour))
        images.append(store.put_image(fresh_image(data, index=index), {}))
    return generation_of(REQUEST, *images)


def delivered(
    generation: Generation, store: ImageStore, key: str, renditions: list[Rendition] = RENDITIONS
) -> list[DeliveredImage]:
    return Delivery(store, key, "b", WHEN, versions=versions_of(renditions)).deliver(generation, {})


def test_renditions_beside_their_image(store: ImageStore) -> None:
    """Each is an object of its own, with its own facts and its source; keys tell them by name, size and kind."""
    generation = made_in(store)
    copies = delivered(generation, store, "{index}/{rendition}-{size}.{ext}")
    keys = ["original-64x48.png", "webp-32-32x24.webp", "thumb-16x12.jpg"]
    assert [copy.uri for copy in copies] == [store.uri(f"{i}/{key}") for i in (0, 1) for key in keys]
    assert [(copy.rendition, copy.recipe) for copy in copies[:3]] == [
        (None, None),
        ("webp-32", "webp-32-q80"),
        ("thumb", "jpeg-16-q85"),
    ]
    for number, copy in enumerate(copies):
        data = store.read_bytes(copy.uri)
        image = Image.open(io.BytesIO(data))
        assert (copy.width, copy.height, copy.media_type) == (*image.size, image.get_format_mimetype())
        assert (copy.size_bytes, copy.source_uri) == (len(data), generation.images[number // 3].uri)
        found = store.objects.look(store.objects.key(copy.uri))
        assert found is not None
        assert (found.metadata["sha256"], found.tag) == (copy.sha256, copy.etag)
        assert found.metadata["request-hash"] == generation.request_hash
    assert found.metadata["source-sha256"] == generation.images[1].sha256
    assert delivered(generation, store, "{index}/{rendition}-{size}.{ext}") == copies


def test_an_older_rendition_counts_by_its_recipe(store: ImageStore) -> None:
    """What another Pillow made of the same image in the same way is left as it is; another recipe's is refused."""
    generation = made_in(store)
    first = delivered(generation, store, "{index}-{rendition}")[1]
    objects, key = store.objects, store.objects.key(first.uri)
    found = objects.look(key)
    assert found is not None
    facts = store.delivered_facts(first.media_type, "0" * 64, found.metadata, key)
    objects.write(key, lambda: io.BytesIO(b"as an older Pillow makes it"), facts)
    again = delivered(generation, store, "{index}-{rendition}")[1]
    assert (store.read_bytes(again.uri), again.sha256) == (b"as an older Pillow makes it", "0" * 64)
    other = Rendition(max_size=32, quality=70, name="webp-32")
    with pytest.raises(StoreError, match="holds something else"):
        delivered(generation, store, "{index}-{rendition}", [other])


@pytest.mark.parametrize("pixels", [None, "64x0"])
def test_metadata_that_makes_no_sense_is_no_renditions(store: ImageStore, pixels: str | None) -> None:
    """An object that says of itself how it was made, but not its size, is something else."""
    generation = made_in(store)
    first = delivered(generation, store, "{index}-{rendition}")[1]
    key = store.objects.key(first.uri)
    said = {name: value for name, value in store.objects.look(key).metadata.items() if name != "pixels"}
    facts = Facts("image/webp", metadata=said | ({"pixels": pixels} if pixels else {}) | {"sha256": "0" * 64})
    store.objects.write(key, lambda: io.BytesIO(b"whatever"), facts)
    with pytest.raises(StoreError, match="holds something else"):
        delivered(generation, store, "{index}-{rendition}")


def test_equal_bytes_from_elsewhere_are_a_success(store: ImageStore) -> None:
    """A rendition whose metadata got lost counts by its bytes; other bytes are somebody else's."""
    generation = made_in(store)
    first = delivered(generation, store, "{index}-{rendition}")[1]
    key = store.objects.key(first.uri)
    store.write(key, store.read_bytes(first.uri), "image/webp")
    assert delivered(generation, store, "{index}-{rendition}")[1].sha256 == first.sha256
    store.write(key, b"something else", "image/webp")
    with pytest.raises(StoreError, match="holds something else"):
        delivered(generation, store, "{index}-{rendition}")


def test_what_is_there_costs_one_look(s3_server: S3Server) -> None:
    """A second delivery fetches nothing and makes nothing: one request for each rendition."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        generation = made_in(store)
        delivered(generation, store, "{index}-{rendition}")
        proxy.seen.clear()
        delivered(generation, store, "{index}-{rendition}")
        assert {method for method, _ in proxy.seen} == {"HEAD"}
        assert len(proxy.seen) == 6


def test_versions_that_would_meet_are_refused_before_anything_is_delivered(store: ImageStore) -> None:
    """Types and sizes don't tell versions apart; `{rendition}` does, and a single version needs none."""
    generation = made_in(store)
    for key in (DEFAULT_KEY, "{index}-{size}.{ext}"):
        with pytest.raises(KeyTemplateError, match=r"\(original, webp-32, thumb\).*add \{rendition\}"):
            delivered(generation, store, key)
    assert list(store.list("0")) == []
    versions = versions_of(RENDITIONS[:1], keep_original=False)
    alone = Delivery(store, "{index}.{ext}", "b", WHEN, versions=versions).deliver(generation, {})
    assert [copy.uri for copy in alone] == [store.uri("0.webp"), store.uri("1.webp")]


def test_a_place_knows_what_was_put_there_before(folder_store: ImageStore) -> None:
    """A copy stands while it is the same image's in the same version."""
    generation = made_in(folder_store)
    copies = delivered(generation, folder_store, "{index}-{rendition}")
    delivery = Delivery(folder_store, "{index}-{rendition}", "b", WHEN, versions=versions_of(RENDITIONS))
    places = delivery.places(delivery.keys(REQUEST, {}), generation.images)
    assert all(place.is_of(copy) for place, copy in zip(places, copies, strict=True))
    assert not any(place.is_of(copies[4]) for place in places[:4] + places[5:])
    assert not replace(places[4], version=Rendition(max_size=32, quality=70)).is_of(copies[4])


@pytest.mark.parametrize("form", ["GIF", "BMP", "AVIF"])
def test_kinds_that_the_api_does_not_promise_are_kept_like_any_other(
    each_store: ImageStore, form: str
) -> None:
    """A paid GIF, BMP or AVIF is stored, found again, delivered and rendered under its own type, and verified."""
    data = saved(Image.new("RGB", (64, 48), "red"), form)
    with (
        HostileServer(answer(200, answered(data))) as server,
        TTAPIClient("any-key", server.url) as client,
    ):
        paid = engine_of(each_store, client, "one").generate(REQUEST)
        found = engine_of(each_store, client, "two").generate(REQUEST)
        assert len(server.requests) == 1
    assert found.generation == paid.generation
    (image,) = paid.generation.images
    kind = form.lower()
    assert (image.media_type, image.uri.rpartition(".")[2]) == (f"image/{kind}", kind)
    copies = delivered(paid.generation, each_store, "{rendition}.{ext}")
    assert [copy.uri.rpartition("/")[2] for copy in copies] == [
        f"original.{kind}",
        "webp-32.webp",
        "thumb.jpg",
    ]
    assert copies[0].media_type == f"image/{kind}"
    assert list(verify(each_store)) == []
