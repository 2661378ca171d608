"""What is particular to S3: what its failures mean, how often it is asked, and answers that get lost."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable
from urllib.request import Request, urlopen

import pytest
from moto.core.authorization import enable_iam_authentication

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.objects import Condition, ConflictError, Facts, NoAnswerError, waiting
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import fresh_image, stored
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server, connected, moto_server

FACTS = Facts("application/json")


def written(store: ImageStore, key: str, data: bytes, expected: Condition | str = Condition.ANYTHING) -> str:
    return store.objects.write(key, lambda: io.BytesIO(data), FACTS, expected)


def one_line(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(StoreError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_bucket_that_does_not_exist(s3_server: S3Server) -> None:
    """A missing bucket is said to be missing; it is never taken for a missing object."""
    store = ImageStore(url="s3://no-such-bucket/here", **s3_server.settings())
    one_line(store.check, "s3://no-such-bucket/here", "the bucket does not exist: create it")
    one_line(lambda: store.read("ledger/x.json"), "the bucket does not exist")
    one_line(lambda: store.write("x", b"", "text/plain"), "the bucket does not exist")
    one_line(lambda: list(store.list("")), "the bucket does not exist")


def test_an_endpoint_where_nothing_answers() -> None:
    """A refused connection names the endpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        store = ImageStore(
            url="s3://bucket", endpoint_url=endpoint, access_key_id="k", secret_access_key="s", region="r"
        )
        one_line(store.check, endpoint, "nothing answers there")
        with pytest.raises(StoreError) as wrong_address:
            store.read("a")
        assert not isinstance(wrong_address.value, NoAnswerError)


def test_an_endpoint_that_goes_away_is_waited_for() -> None:
    """A service that has answered before is asked again while nobody is there: it is no wrong address."""
    with moto_server() as server:
        store = connected(ImageStore(url=f"s3://{server.new_bucket()}", **server.settings()))
    with waiting(0), pytest.raises(NoAnswerError, match="nothing answers there"):
        store.read("a")


def test_wrong_keys(s3_server: S3Server) -> None:
    """An unknown access key, a wrong secret and a missing permission each say what to correct."""
    url = f"s3://{s3_server.new_bucket()}"
    client = s3_server.client("iam")
    client.create_user(UserName="somebody")
    key = client.create_access_key(UserName="somebody")["AccessKey"]
    client.close()
    wrong = {"access_key_id": key["AccessKeyId"], "secret_access_key": "wrong-secret"}
    right = {"access_key_id": key["AccessKeyId"], "secret_access_key": key["SecretAccessKey"]}
    with enable_iam_authentication():  # which moto does not look at otherwise
        one_line(ImageStore(url=url, **s3_server.settings()).check, "access_key_id")
        one_line(ImageStore(url=url, **s3_server.settings(**wrong)).check, "the secret access key is wrong")
        one_line(ImageStore(url=url, **s3_server.settings(**right)).check, "s3:PutObject")


def test_without_any_credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the AWS chain finds nothing, the line says which fields to fill in."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    store = ImageStore(url=f"s3://{s3_server.new_bucket()}", endpoint_url=s3_server.url)
    one_line(store.check, "there are no credentials: give access_key_id")


@pytest.mark.parametrize(
    ("ignored", "promise"), [("If-None-Match", "creates an object twice"), ("If-Match", "ignores If-Match")]
)
def test_a_store_that_ignores_conditions_is_refused(s3_server: S3Server, ignored: str, promise: str) -> None:
    """A service that drops a conditional header says yes to what it should refuse: the check finds out."""

    def drop(_method: str, _path: str, headers: dict[str, str]) -> None:
        for name in [name for name in headers if name.lower() == ignored.lower()]:
            del headers[name]

    with meddling_proxy(s3_server.url, drop) as proxy:
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        one_line(store.check, promise, "two machines could pay")


def test_the_check_is_cheap_and_can_be_had_once(s3_server: S3Server) -> None:
    """A check takes 4 requests, 5 at first, and leaves one small object; `check_once` asks again after a failure."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        store.check_once()
        store.check_once()
        assert len(proxy.seen) == 5
        store.check()
        assert len(proxy.seen) == 9
        assert [found.key for found in store.list("")] == ["ledger/probe.json"]


def test_reads_and_plain_writes_are_tried_again(s3_server: S3Server) -> None:
    """Each 503 on a read or an unconditional write costs one more request: nothing multiplies retries."""
    bucket = s3_server.new_bucket()
    trouble: list[int] = []
    with meddling_proxy(s3_server.url, lambda *_: trouble.pop() if trouble else None) as proxy:
        store = connected(ImageStore(url=f"s3://{bucket}", **s3_server.settings(endpoint_url=proxy.url)))
        proxy.seen.clear()
        trouble += [503, 503]
        store.write("key", b"data", "text/plain")
        assert len(proxy.seen) == 3
        trouble.append(500)
        assert store.read("key") == b"data"
        assert len(proxy.seen) == 5
        trouble.append(503)
        assert store.size("key") == 4
        assert len(proxy.seen) == 7


def test_bodies_that_are_cut_short_are_read_again(s3_server: S3Server) -> None:
    """A body that ends before its length is not taken for the object, whichever way it is read."""
    bucket = s3_server.new_bucket()
    cut: list[str] = []
    with meddling_proxy(
        s3_server.url, lambda method, *_: cut.pop() if method == "GET" and cut else None
    ) as proxy:
        store = ImageStore(url=f"s3://{bucket}", **s3_server.settings(endpoint_url=proxy.url))
        image = stored(store, b"pixels")
        key = store.objects.key(image.uri)
        for read in (store.read, lambda _: store.read_bytes(image.uri)):
            cut.append("cut the answer short")
            assert read(key) == b"pixels"
        cut.append("cut the answer short")
        assert store.objects.digest(key) == (6, image.sha256)
        assert not cut


@pytest.mark.parametrize("trouble", [500, 503, 409, "lose the answer", "swallow"])
def test_a_conditional_write_without_an_answer_says_so(s3_server: S3Server, trouble: str | int) -> None:
    """An unsettled conditional write is reported as such, and is not sent again behind the ledger's back."""
    bucket = s3_server.new_bucket()
    armed = []
    with meddling_proxy(s3_server.url, lambda *_: trouble if armed else None) as proxy:
        store = ImageStore(url=f"s3://{bucket}", **s3_server.settings(endpoint_url=proxy.url))
        tag = written(store, "key", b"1", Condition.NOTHING)
        assert '"' not in tag  # Ceph refuses quoted ones
        armed.append(True)
        before = len(proxy.seen)
        with pytest.raises((NoAnswerError, ConflictError)) as caught:
            written(store, "key", b"2", tag)
        if isinstance(trouble, int):
            assert caught.type is NoAnswerError
        assert len(proxy.seen) - before <= (1 if isinstance(trouble, int) else 2)
        armed.clear()
        assert store.read("key") == (b"2" if trouble == "lose the answer" else b"1")


def test_uploads_are_retried_from_the_first_byte(s3_server: S3Server) -> None:
    """An image whose upload fails in between is whole after the next attempt."""
    trouble: list[str | int] = []
    big = bytes(range(256)) * 4096
    with meddling_proxy(
        s3_server.url, lambda method, *_: trouble.pop() if method == "PUT" and trouble else None
    ) as proxy:
        url = f"s3://{s3_server.new_bucket()}"
        store = connected(ImageStore(url=url, **s3_server.settings(endpoint_url=proxy.url)))
        trouble += ["swallow", 500]
        image = store.put_image(fresh_image(big), {})
        assert store.read_bytes(image.uri) == big
        assert not trouble


def test_a_store_that_stays_silent_is_given_up_in_time(s3_server: S3Server) -> None:
    """Patience ends: an image that can't be stored fails with a line that names it."""
    with meddling_proxy(s3_server.url, lambda *_: 503) as proxy:
        store = ImageStore(url="s3://bucket", **s3_server.settings(endpoint_url=proxy.url))
        image = fresh_image(b"pixels")
        with waiting(0.3):
            one_line(lambda: store.objects.write("images/a.png", image.open, FACTS), "images/a.png")
            with pytest.raises(NoAnswerError):
                store.read("x")


def test_objects_say_what_they_are(s3_server: S3Server) -> None:
    """On S3 an image has its content type, the store's Cache-Control, and metadata in ASCII."""
    bucket = s3_server.new_bucket()
    store = ImageStore(url=f"s3://{bucket}/p", cache_control="max-age=60", **s3_server.settings())
    image = store.put_image(
        fresh_image(b"pixels", "image/webp"), {"request_hash": "ab", "prompt": "Zoë 灯台"}
    )
    client = s3_server.client()
    head = client.head_object(Bucket=bucket, Key=f"p/images/{image.sha256}.webp")
    client.close()
    assert (head["ContentType"], head["CacheControl"]) == ("image/webp", "max-age=60")
    assert head["Metadata"] == {
        "request-hash": "ab",
        "prompt": "Zo%C3%AB %E7%81%AF%E5%8F%B0",
        "sha256": image.sha256,
    }


def test_signed_addresses_open_without_credentials(s3_server: S3Server) -> None:
    """A signed address is SigV4, bounded in time, and anybody can read the object with it."""
    store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings())
    url = store.presign(stored(store, b"pixels").uri, 60)
    assert "X-Amz-Signature=" in url
    assert "X-Amz-Expires=60" in url
    assert s3_server.secret_access_key not in url
    with urlopen(Request(url)) as answer:  # noqa: S310 - loopback
        assert answer.read() == b"pixels"
    one_line(lambda: store.presign(store.uri("x"), 0), "1 to 604,800")
    one_line(lambda: store.presign("s3://elsewhere/x", 60), "is not in")


def test_long_listings_have_every_page(s3_server: S3Server) -> None:
    """A listing of more than S3's 1,000 keys a page is whole."""
    bucket = s3_server.new_bucket()
    s3_server.fill(bucket, (f"p/ledger/{number:04d}" for number in range(1005)))
    store = ImageStore(url=f"s3://{bucket}/p", **s3_server.settings())
    assert [found.key for found in store.list("ledger/")] == [f"ledger/{n:04d}" for n in range(1005)]
