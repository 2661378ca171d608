"""What is said of objects when they are put on S3, and that they arrive whole: headers and checks."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import md5 as any_md5

import pytest

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import deliver, fresh_image, stored
from tests.support.meddling import Meddle, Order, meddling_proxy
from tests.support.s3 import S3Server

md5 = partial(any_md5, usedforsecurity=False)

#: More than goes in one piece from memory, and no multiple of it.
BIG = bytes(range(256)) * 4096 + b"the end"

UPLOAD = {
    "content_disposition": "attachment",
    "tags": {"campaign": "May + June", "größe": "1/2"},
    "acl": "public-read",
    "storage_class": "STANDARD_IA",
    "encryption": "aws:kms",
    "kms_key_id": "alias/pictures",
}


@contextmanager
def through(server: S3Server, meddle: Meddle, **fields: object) -> Iterator[tuple[ImageStore, list]]:
    """A store behind a proxy, and the requests that the proxy got."""
    with meddling_proxy(server.url, meddle) as proxy:
        url = f"s3://{server.new_bucket()}/p"
        yield ImageStore(url=url, **server.settings(endpoint_url=proxy.url), **fields), proxy.seen


@pytest.mark.parametrize("way", ["uploaded", "copied by the service"])
@pytest.mark.parametrize("data", [b"pixels", BIG], ids=["small", "big"])
def test_delivered_images_carry_all_that_is_asked_for(
    s3_server: S3Server, folder_store: ImageStore, way: str, data: bytes
) -> None:
    """However a delivered image gets there, it has disposition, tags, ACL, class, encryption and metadata."""
    bucket = s3_server.new_bucket()
    target = ImageStore(
        url=f"s3://{bucket}", upload=UPLOAD, cache_control="max-age=60", **s3_server.settings()
    )
    source = target if way == "copied by the service" else folder_store
    image = stored(source, data)
    delivered = deliver(target, image, "2031/Zoë.png", source, {"model": "dall-e-2"})
    client = s3_server.client()
    key = {"Bucket": bucket, "Key": "2031/Zoë.png"}
    head = client.head_object(**key)
    tags = client.get_object_tagging(**key)["TagSet"]
    grants = client.get_object_acl(**key)["Grants"]
    client.close()
    assert head["ContentDisposition"] == "attachment; filename=\"Zo_.png\"; filename*=UTF-8''Zo%C3%AB.png"
    assert (head["StorageClass"], head["CacheControl"]) == ("STANDARD_IA", "max-age=60")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/pictures")
    assert head["Metadata"] == {"model": "dall-e-2", "sha256": image.sha256}
    assert {tag["Key"]: tag["Value"] for tag in tags} == UPLOAD["tags"]
    assert any(grant["Permission"] == "READ" for grant in grants)
    assert (head["ContentLength"], head["ETag"].strip('"')) == (image.size_bytes, delivered.etag)


def test_kept_images_and_documents_carry_less(s3_server: S3Server) -> None:
    """What is kept has class and encryption; the ledger has encryption alone, which a bucket may insist on."""
    asked: dict[str, dict[str, str]] = {}

    def note(method: str, path: str, headers: dict[str, str]) -> None:
        if method == "PUT":
            asked[path.rpartition("/")[2]] = {
                name.lower().removeprefix("x-amz-"): value for name, value in headers.items()
            }

    with through(s3_server, note, upload=UPLOAD) as (store, _):
        image = stored(store)
        store.compare_and_swap("ledger/record.json", b"{}", None)
        store.write("manifest.jsonl", b"{}", "application/jsonl")
    image_headers = asked[f"{image.sha256}.png"]
    assert image_headers["storage-class"] == "STANDARD_IA"
    for headers in asked.values():
        assert headers["server-side-encryption"] == "aws:kms"
        assert headers["server-side-encryption-aws-kms-key-id"] == "alias/pictures"
        assert not {"acl", "tagging", "content-disposition"} & headers.keys()
    assert [name for name, headers in asked.items() if "storage-class" in headers] == [f"{image.sha256}.png"]


def test_every_body_has_its_md5(s3_server: S3Server) -> None:
    """Each PUT says the MD5 of its body, so that the service refuses what was altered on the way."""
    said: list[str] = []

    def note(method: str, _path: str, headers: dict[str, str]) -> None:
        if method == "PUT":
            said.append(headers["Content-MD5"])

    with through(s3_server, note) as (store, _):
        store.compare_and_swap("ledger/record.json", b"{}", None)
        for body in (b"pixels", BIG):
            stored(store, body)
    assert said == [base64.b64encode(md5(body).digest()).decode() for body in (b"{}", b"pixels", BIG)]


def test_documents_are_sent_without_asking_first(s3_server: S3Server) -> None:
    """What is small takes one way to the service and back; of a big body the service may say that it isn't wanted."""
    asked: list[bool] = []

    def note(_method: str, _path: str, headers: dict[str, str]) -> None:
        asked.append("Expect" in headers)

    with through(s3_server, note) as (store, _):
        store.compare_and_swap("ledger/record.json", b"{}", None)
        stored(store, BIG)
    assert asked == [False, True]


def test_an_image_is_looked_at_again_where_its_tag_proves_nothing(s3_server: S3Server) -> None:
    """A tag that is the MD5 costs no further request; another one costs a look; a document costs none either way."""
    other: dict[str, str] = {}
    with through(s3_server, lambda method, *_: other if method == "PUT" else None) as (store, seen):
        stored(store, b"first")
        assert [method for method, _ in seen] == ["PUT"]
        other["ETag"] = '"encrypted"'
        seen.clear()
        stored(store, b"second")
        store.write("page.html", b"page", "text/html")
        assert [method for method, _ in seen] == ["PUT", "HEAD", "PUT"]


def test_an_image_that_is_not_what_was_sent_is_an_error(s3_server: S3Server) -> None:
    """A service that keeps something else than it was sent is found out before the image counts as stored."""
    orders: dict[str, Order] = {"PUT": {"ETag": '"encrypted"'}}
    with through(s3_server, lambda method, *_: orders.get(method)) as (store, _):
        image = fresh_image(b"pixels")
        orders |= {"HEAD": {"Content-Length": "3"}, "GET": "alter the answer"}
        with pytest.raises(StoreError, match="something else than was sent"):
            store.put_image(image, {})


def test_a_refused_copy_is_an_upload(s3_server: S3Server) -> None:
    """Where the service won't copy, or may not, the bytes are read and written with the same result."""
    for refusal in (403, 501):
        meddle: Meddle = lambda method, _, headers, refusal=refusal: (  # noqa: E731
            refusal if method == "PUT" and "x-amz-copy-source" in headers else None
        )
        with through(s3_server, meddle) as (store, seen):
            image = stored(store)
            seen.clear()
            assert store.read_bytes(deliver(store, image, "a.png").uri) == b"pixels"
            assert [method for method, _ in seen] == ["HEAD", "PUT", "GET", "PUT", "GET"]
