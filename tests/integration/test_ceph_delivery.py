"""Delivery to Ceph, which checks what is said: uploads, tags, ACL, disposition, encryption, copies."""

from __future__ import annotations

import io

import httpx
import pytest

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.objects import Condition, ConflictError, Facts
from prefect_ttapi.storage.store import ImageStore
from tests.support.ceph import CephServer
from tests.support.generations import deliver, delivery_to, stored
from tests.support.meddling import meddling_proxy

pytestmark = pytest.mark.integration

#: 16 MiB and a bit.
BIG = bytes(range(256)) * (16 * 1024 * 4) + b"the end"
UPLOAD = {
    "content_disposition": "attachment",
    "tags": {"campaign": "May + June", "größe": "1/2"},
    "acl": "public-read",
}


def store_at(ceph: CephServer, endpoint_url: str | None = None, **fields: object) -> ImageStore:
    """A store in a bucket of its own."""
    settings = ceph.settings(endpoint_url=endpoint_url or ceph.url)
    return ImageStore(url=f"s3://{ceph.new_bucket()}/p", **settings, **fields)


@pytest.mark.parametrize("data", [b"pixels", BIG], ids=["small", "big"])
@pytest.mark.parametrize("way", ["uploaded", "copied by the service"])
def test_delivered_images_carry_what_is_asked_for(ceph: CephServer, tmp_path, way: str, data: bytes):
    """Disposition, tags, ACL and metadata are there, whichever way it got there, and anybody may read it."""
    target = store_at(ceph, upload=UPLOAD)
    delivery_to(target).check()
    source = target if way == "copied by the service" else ImageStore(url=str(tmp_path / "store"))
    image = stored(source, data)
    delivered = deliver(target, image, "2031/Zoë.png", source, {"model": "dall-e-2"})
    client = ceph.client()
    bucket, _, key = delivered.uri.removeprefix("s3://").partition("/")
    head = client.head_object(Bucket=bucket, Key=key)
    tags = client.get_object_tagging(Bucket=bucket, Key=key)["TagSet"]
    client.close()
    assert head["ContentDisposition"] == "attachment; filename=\"Zo_.png\"; filename*=UTF-8''Zo%C3%AB.png"
    assert head["Metadata"] == {"model": "dall-e-2", "sha256": image.sha256}
    assert {tag["Key"]: tag["Value"] for tag in tags} == UPLOAD["tags"]
    assert [(found.size, found.tag) for found in target.list("2031/")] == [(len(data), delivered.etag)]
    anybody = httpx.get(f"{ceph.url}/{bucket}/{key}")
    assert (anybody.status_code, anybody.content == data) == (200, True)
    assert deliver(target, image, "2031/Zoë.png", source).etag == delivered.etag


def test_an_image_altered_on_the_way_is_sent_again(ceph: CephServer):
    """A big image that arrives with a bit flipped is refused by its MD5, sent once more, and whole."""
    orders = ["alter the body"]
    with meddling_proxy(
        ceph.url, lambda method, *_: orders.pop() if method == "PUT" and orders else None
    ) as proxy:
        store = store_at(ceph, proxy.url, patience=2)
        image = stored(store, BIG)
        assert not orders
        assert store.read_bytes(image.uri) == BIG


@pytest.mark.parametrize("data", [b"pixels", BIG], ids=["small", "big"])
def test_what_is_there_is_not_overwritten(ceph: CephServer, data: bytes):
    """A write that expects nothing is refused where something is, whatever its length."""
    objects = store_at(ceph).objects
    facts = Facts("image/png", metadata={"sha256": "ab"})
    objects.write("key", lambda: io.BytesIO(b"first"), facts, Condition.NOTHING)
    with pytest.raises(ConflictError):
        objects.write("key", lambda: io.BytesIO(data), facts, Condition.NOTHING)
    assert objects.read("key")[0] == b"first"


def test_an_md5_that_is_wrong_is_refused(ceph: CephServer):
    """The MD5 that goes with each body is looked at by the service: a wrong one is refused, and nothing is written."""

    def lie(method: str, _path: str, headers: dict[str, str]) -> None:
        said.append(headers.get("Content-MD5"))

    said: list[str | None] = []
    with meddling_proxy(ceph.url, lie) as proxy:
        store = store_at(ceph, proxy.url)
        store.write("a", b"data", "text/plain")
    assert said == ["jXd/OF09/siBXSD3SWAm3A=="]
    client = ceph.client()
    place = {"Bucket": store.url.split("/")[2], "Key": "p/b", "ContentMD5": said[0]}
    url = client.generate_presigned_url("put_object", Params=place)
    client.close()
    refused = httpx.put(url, content=b"date", headers={"Content-MD5": said[0]})
    assert (refused.status_code, "BadDigest" in refused.text) == (400, True)
    assert [found.key for found in store.list("")] == ["a"]


@pytest.mark.parametrize(
    "upload", [{"encryption": "aws:kms", "kms_key_id": "no-such-key"}, {"encryption": "AES256"}]
)
def test_encryption_that_can_not_be_had_is_found_by_the_check(ceph: CephServer, upload: dict):
    """A gateway without keys to encrypt with refuses the check of a store that asks for encryption, in one line."""
    store = store_at(ceph, upload=upload)
    for check in (store.check, delivery_to(store).check):
        with pytest.raises(StoreError, match="perhaps for one of the upload options") as refused:
            check()
        assert "\n" not in str(refused.value)
