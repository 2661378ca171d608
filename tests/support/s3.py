"""An S3 service for tests: moto's server, spoken to over real HTTP."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import boto3
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

from prefect_ttapi.storage.store import ImageStore

_numbers = itertools.count(1)


@dataclass(frozen=True)
class S3Server:
    """Where it is, and a key that it takes."""

    url: str
    access_key_id: str = "AKIATESTS"
    secret_access_key: str = "wJalrXUtnFEMI-tests-only"

    def client(self, service: str = "s3"):
        """A boto3 client, to look at the service from outside; to be closed."""
        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
        )

    def new_bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"pictures-{next(_numbers)}"
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(name, "us-east-1")
        return name

    def fill(self, bucket: str, keys: Iterable[str]) -> None:
        """Put empty objects there, without the time that as many requests would take."""
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for key in keys:
            backend.put_object(bucket, key, b"")

    def settings(self, **changes: object) -> dict[str, object]:
        """What an ImageStore needs besides its url."""
        return {
            "endpoint_url": self.url,
            "region": "us-east-1",
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            **changes,
        }


def connected(store: ImageStore) -> ImageStore:
    """The store with a client made: on a busy machine that takes most of the patience that a request has."""
    assert store.read("nothing") is None
    return store


def said(
    code: str, status: int = 403, inside: str = "", words: str = "their words", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """An answer as S3 services give it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{words}</Message>{inside}</Error>"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/xml", **named}, body.encode()


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """moto's server, in threads of this process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3 service for all tests; each takes buckets of its own.

    Like S3, and unlike moto, it looks at a precondition and writes in one step.
    """
    put, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_object(response: S3Response) -> object:
        with one_at_a_time:
            return put(response)

    with pytest.MonkeyPatch.context() as moto, moto_server() as server:
        moto.setattr(S3Response, "put_object", put_object)
        yield server


@pytest.fixture
def new_bucket(s3_server: S3Server) -> Callable[[], str]:
    """Makes a new bucket and gives its name."""
    return s3_server.new_bucket


@pytest.fixture
def s3_store(s3_server: S3Server) -> ImageStore:
    """A store below a prefix of a new bucket."""
    return ImageStore(url=f"s3://{s3_server.new_bucket()}/some/prefix", **s3_server.settings())
