"""What services say when something is wrong, and the one line that comes of it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, SSLError

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.objects import NoAnswerError
from prefect_ttapi.storage.s3_service import explain
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import delivery_to
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server, connected, said
from tests.support.tls import Identity, identity


@pytest.fixture(scope="module")
def refusing(s3_server: S3Server) -> Iterator[tuple[ImageStore, list]]:
    """A store at a service that gives one answer to everything, and the list that the answer is put into."""
    answers: list = []
    with meddling_proxy(s3_server.url, lambda *_: answers[0]) as proxy:
        yield ImageStore(url="s3://pictures/here", **s3_server.settings(endpoint_url=proxy.url)), answers


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (said("NoSuchBucket", 404), "the bucket does not exist: create it"),
        (said("AccessDenied"), "they need s3:GetObject, s3:PutObject and s3:ListBucket"),
        (said("InvalidAccessKeyId"), "the access key ID is unknown there"),
        (said("SignatureDoesNotMatch"), "the secret access key is wrong"),
        (said("ExpiredToken", 400), "the credentials have expired: renew them"),
        (said("RequestTimeTooSkewed"), "this machine's clock is wrong: set it"),
        (
            said("AuthorizationHeaderMalformed", 400, "<Region>eu-central-1</Region>"),
            "the bucket is in the region eu-central-1: set the store's region",
        ),
        (
            said("PermanentRedirect", 301, x_amz_bucket_region="eu-west-1"),
            "the bucket is in the region eu-west-1: set the store's region",
        ),
        (
            said(
                "AuthorizationHeaderMalformed",
                400,
                "",
                "unexpected scope, expected: 20310501/garage/s3/aws4_request",
            ),
            "the bucket is in the region garage: set the store's region",
        ),
        (said("InvalidRegion", 400), "the bucket is in another region: set the store's region"),
        (
            said("AccessDenied"),
            "without which what is missing is forbidden; buckets whose requesters pay can't be",
        ),
        (said("KMS.DisabledException", 400), "the KMS key can't be used: correct upload.kms_key_id"),
        (said("AccessControlListNotSupported", 400), "leave out upload.acl"),
        (said("NotImplemented", 501), "this service can't do it"),
        (said("QuotaExceeded"), "the store is full"),
        (said("NobodyKnowsThis", 418), "their words"),
        (said("Nobody\x9b2J\u202eKnows", 418), "(Nobody 2J Knows, HTTP 418)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_is_one_line(refusing: tuple[ImageStore, list], answer: tuple, line: str) -> None:
    """Each refusal is told in one line that names the place and what to do about it."""
    store, answers = refusing
    answers[:] = [answer]
    with pytest.raises(StoreError, match=re.escape(line)) as refused:
        store.check()
    message = str(refused.value)
    assert "\n" not in message
    assert f"s3://pictures/here/ledger/probe.json at {store.endpoint_url}: " in message
    assert store.secret_access_key.get_secret_value() not in message


def test_a_wrong_clock_is_told_by_how_much(refusing: tuple[ImageStore, list]) -> None:
    """Where the service says what time it is, the line says how far this machine's clock is off."""
    store, answers = refusing
    for by, words in ((-3600, "60 minutes fast"), (7200, "120 minutes slow")):
        answers[:] = [said("RequestTimeTooSkewed", Date=formatdate(time.time() + by, usegmt=True))]
        with pytest.raises(StoreError, match=f"this machine's clock is {words}: set it"):
            store.check()


def test_who_may_read_but_not_write_is_told_so(s3_server: S3Server) -> None:
    """A store that can be read and not written fails its check, whichever of both ways it is asked."""
    refused = said("AccessDenied")
    bucket = s3_server.new_bucket()
    with meddling_proxy(
        s3_server.url, lambda method, *_: None if method in ("GET", "HEAD") else refused
    ) as proxy:
        store = ImageStore(url=f"s3://{bucket}", **s3_server.settings(endpoint_url=proxy.url))
        for check in (store.check, delivery_to(store).check):
            with pytest.raises(StoreError, match=r"can't write s3://.*s3:PutObject"):
                check()


def test_what_arrived_damaged_is_sent_again(s3_server: S3Server) -> None:
    """A body that the service finds altered is sent once more, and named where it stays so."""
    orders: list[object] = []
    with meddling_proxy(
        s3_server.url, lambda method, *_: orders.pop() if method == "PUT" and orders else None
    ) as proxy:
        url = f"s3://{s3_server.new_bucket()}"
        store = connected(ImageStore(url=url, **s3_server.settings(endpoint_url=proxy.url)))
        orders.append(said("BadDigest", 400))
        store.write("page.html", b"page", "text/html")
        assert store.read("page.html") == b"page"
        assert not orders
        orders.append(said("XAmzContentSHA256Mismatch", 400))
        with pytest.raises(NoAnswerError, match="altered or cut short on the way"):
            store.compare_and_swap("ledger/a.json", b"{}", None)


@pytest.fixture(scope="module")
def known() -> Identity:
    """Who the service says it is."""
    return identity("localhost")


@pytest.mark.parametrize(("tls", "line"), [(True, "connection.ca_file"), (False, "speaks no TLS")])
def test_trouble_with_tls_is_told_apart(s3_server: S3Server, known: Identity, tls: bool, line: str) -> None:
    """A certificate that nobody vouches for and an endpoint without TLS ask for different things."""
    with meddling_proxy(s3_server.url, lambda *_: None, known.server if tls else None) as proxy:
        endpoint = f"https://localhost:{proxy.server_port}"
        store = ImageStore(url="s3://pictures", **s3_server.settings(endpoint_url=endpoint))
        with pytest.raises(StoreError, match=re.escape(line)) as refused:
            store.check()
        assert "\n" not in str(refused.value)
        assert proxy.seen == []


def test_private_authorities_are_trusted_where_they_are_named(
    s3_server: S3Server, known: Identity, tmp_path: Path
) -> None:
    """With its certificate in `ca_file` a private service is spoken to, and with verification off any."""
    (tmp_path / "authority.pem").write_bytes(known.pem)
    bucket = s3_server.new_bucket()
    with meddling_proxy(s3_server.url, lambda *_: None, known.server) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url)
        for number, trust in enumerate(({"ca_file": str(tmp_path / "authority.pem")}, {"verify_tls": False})):
            store = ImageStore(url=f"s3://{bucket}/{number}", connection=trust, **settings)
            store.check()
            assert store.read("ledger/probe.json")


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_a_file_without_certificates_is_named(tmp_path: Path, content: bytes | None) -> None:
    """A CA file that is not there, or is none, is said to be, and not taken for a lost connection."""
    path = tmp_path / "ca.pem"
    if content:
        path.write_bytes(content)
    store = ImageStore(
        url="s3://pictures", endpoint_url="https://127.0.0.1:9", connection={"ca_file": str(path)}
    )
    with pytest.raises(
        StoreError, match=f"can't use the certificates in {path}: .*correct connection.ca_file"
    ):
        store.read("x")


@pytest.mark.parametrize(
    ("said", "may_have_happened"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", False),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", False),
        ("EOF occurred in violation of protocol (_ssl.c:1006)", True),
    ],
)
def test_a_tls_connection_that_is_lost_settles_nothing(said: str, may_have_happened: bool) -> None:
    """What fails in the handshake was not sent; what fails later may have been, and is asked for again."""
    told = explain(SSLError(endpoint_url="https://s3.example.com", error=said), "can't write a")
    assert isinstance(told, NoAnswerError) == may_have_happened


def test_a_connection_that_takes_too_long_is_tried_again() -> None:
    """An endpoint that is silent may be busy; one that refuses is told at once."""
    where = {"endpoint_url": "https://s3.example.com", "error": "timed out"}
    assert isinstance(explain(ConnectTimeoutError(**where), "can't read a"), NoAnswerError)
    assert not isinstance(explain(EndpointConnectionError(**where), "can't read a"), NoAnswerError)
