"""Objects on Ceph: refused keys and clocks, long listings, signed addresses that end, bodies altered on the way."""

from __future__ import annotations

import time

import httpx
import pytest

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.errors import NotStoredError, StoreError
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.ceph import CephServer
from tests.support.engines import engine_of
from tests.support.generations import deliver, fresh_image, sha256, stored
from tests.support.meddling import Meddle, meddling_proxy

pytestmark = pytest.mark.integration

PIXELS = b"pixels" * 10_000


def nothing(*_: object) -> None:
    """Let it through as it is."""


def an_hour_ago(method: str, path: str, headers: dict[str, str]) -> None:
    """The request as a machine sends it whose clock is an hour slow."""
    headers["X-Amz-Date"] = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - 3600))


def another_host(method: str, path: str, headers: dict[str, str]) -> None:
    """A signed header is rewritten, as by a proxy in between."""
    headers["Host"] = "elsewhere.example.com"


@pytest.mark.parametrize(
    ("meddle", "changes", "advice"),
    [
        (nothing, {"secret_access_key": "another"}, "the secret access key is wrong"),
        (nothing, {"access_key_id": "AKIANOBODY"}, "the access key ID is unknown there"),
        (another_host, {}, "the secret access key is wrong"),
        (an_hour_ago, {}, "this machine's clock is wrong: set it"),
        (nothing, {"url": "s3://no-such-bucket/prefix"}, "the bucket does not exist"),
    ],
    ids=["wrong secret", "unknown key", "wrong signature", "clock skew", "no bucket"],
)
def test_check_says_in_one_line_what_is_wrong(
    ceph: CephServer, ceph_store: ImageStore, meddle: Meddle, changes: dict, advice: str
):
    """What the gateway refuses is told with what to do about it, in one line and without the secret."""
    with meddling_proxy(ceph.url, meddle) as proxy:
        store = ImageStore(url=ceph_store.url, **ceph.settings(endpoint_url=proxy.url))
        store = ImageStore.model_validate(store.model_dump(context={"include_secrets": True}) | changes)
        with pytest.raises(StoreError, match=advice) as raised:
            store.check()
    message = str(raised.value)
    assert "\n" not in message
    assert ceph.secret_access_key not in message


def test_ten_thousand_keys_are_listed(ceph: CephServer, ceph_store: ImageStore):
    """A listing goes on past the 1,000 keys of a page and names each key once, and none of another prefix."""
    bucket, _, prefix = ceph_store.url.removeprefix("s3://").partition("/")
    keys = [f"images/{number:05}.png" for number in range(10_000)]
    ceph.fill(bucket, [f"{prefix}/{key}" for key in [*keys, "imagesque.png", "ledger/a.json"]])
    listed = [found.key for found in ceph_store.list("images/")]
    assert sorted(listed) == keys


def test_a_signed_address_works_until_it_ends(ceph_store: ImageStore):
    """Anyone reads the object with a signed address, nobody without one, or once its seconds have passed."""
    image = stored(ceph_store, PIXELS)
    url = ceph_store.presign(image.uri, 2)
    first = httpx.get(url)
    assert (first.status_code, first.content) == (200, PIXELS)
    assert httpx.get(url.partition("?")[0]).status_code == 403
    deadline = time.monotonic() + 20
    while (status := httpx.get(url).status_code) == 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert status == 403


def altering(kind: str, where: str) -> tuple[Meddle, list[str]]:
    """Flips a bit in what the `kind` of requests to `where` carry, and notes them."""
    altered = []

    def meddle(method: str, path: str, headers: dict[str, str]) -> str | None:
        if method != kind or where not in path:
            return None
        altered.append(path)
        return "alter the body" if kind == "PUT" else "alter the answer"

    return meddle, altered


def test_an_image_altered_on_its_way_there_is_not_stored(ceph: CephServer, ceph_store: ImageStore):
    """The gateway refuses a body that is not what was signed: a StoreError, and no object with wrong bytes."""
    meddle, altered = altering("PUT", "/images/")
    with meddling_proxy(ceph.url, meddle) as proxy:
        through = ImageStore(url=ceph_store.url, **ceph.settings(endpoint_url=proxy.url))
        with pytest.raises(StoreError, match="can't write") as raised:
            through.put_image(fresh_image(PIXELS), {})
    assert altered
    assert "\n" not in str(raised.value)
    assert list(ceph_store.list("")) == []
    assert ceph_store.read_bytes(stored(ceph_store, PIXELS).uri) == PIXELS


def test_what_is_paid_for_survives_a_line_that_alters_it(ceph: CephServer, ceph_store: ImageStore):
    """No image arrives whole: the error says that it is paid for and kept, and a better line stores it unpaid."""
    meddle, altered = altering("PUT", "/images/")
    broken = [True]
    request = ImageRequest(prompt="a lighthouse", model="gpt-image-1")
    with (
        meddling_proxy(ceph.url, lambda *sent: meddle(*sent) if broken else None) as proxy,
        Sandbox(tiny=True) as sandbox,
        TTAPIClient("sandbox-key", sandbox.base_url) as client,
    ):
        through = ImageStore(url=ceph_store.url, patience=0.5, **ceph.settings(endpoint_url=proxy.url))
        with pytest.raises(NotStoredError, match="paid for"):
            engine_of(through, client, "one").generate(request)
        assert altered
        assert list(ceph_store.list("images/")) == []
        assert Ledger(ceph_store, client.api_origin, "two").look_up(request.request_hash) is None
        broken.clear()
        paid = engine_of(through, client, "three").generate(request)
        assert (paid.sent, sandbox.calls) == (False, 1)
    image = paid.generation.images[0]
    assert sha256(ceph_store.read_bytes(image.uri)) == image.sha256


def test_nothing_is_sent_where_the_ledger_can_not_be_written_whole(ceph: CephServer, ceph_store: ImageStore):
    """A claim that is altered on its way is refused, and the API is not called."""
    ceph_store.check()
    meddle, altered = altering("PUT", "/sandbox/")
    with (
        meddling_proxy(ceph.url, meddle) as proxy,
        Sandbox(tiny=True) as sandbox,
        TTAPIClient("sandbox-key", sandbox.base_url) as client,
    ):
        through = ImageStore(url=ceph_store.url, **ceph.settings(endpoint_url=proxy.url))
        with pytest.raises(StoreError, match="can't"):
            engine_of(through, client, "one").generate(ImageRequest(prompt="a kite"))
        assert altered
        assert sandbox.calls == 0


def test_an_image_altered_on_its_way_back_is_not_delivered(ceph: CephServer, ceph_store: ImageStore):
    """What comes with another SHA-256 than recorded is an error that says so, and no copy is left."""
    image = stored(ceph_store, PIXELS)
    meddle, altered = altering("GET", "/images/")
    with meddling_proxy(ceph.url, meddle) as proxy:
        through = ImageStore(url=ceph_store.url, **ceph.settings(endpoint_url=proxy.url))
        with pytest.raises(StoreError, match="damaged"):
            deliver(ceph_store, image, "shop/lighthouse.png", source=through)
    assert altered
    assert ceph_store.size("shop/lighthouse.png") is None
