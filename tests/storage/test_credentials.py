"""Whose credentials are used, and what happens when they expire while a batch runs."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from prefect.blocks.core import Block
from pydantic import ValidationError

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.objects import Condition, Facts
from prefect_ttapi.storage.s3_service import Account
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import stored
from tests.support.meddling import Order, meddling_proxy
from tests.support.s3 import S3Server, said


class Gate:
    """Lets through who has a good key, and tells others that their credentials have expired."""

    def __init__(self, *good: str) -> None:
        self.good = set(good)
        self.refused: list[str] = []
        self.used: set[str] = set()

    def __call__(self, method: str, _path: str, headers: dict[str, str]) -> Order:
        key = headers["Authorization"].partition("Credential=")[2].partition("/")[0]
        self.used.add(key)
        if key in self.good:
            return None
        self.refused.append(method)
        # an answer to HEAD has no body
        return 400 if method == "HEAD" else said("ExpiredToken", 400)


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of credentials that AWS's tools share, and nothing else where they could find any."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    write_key(path, "AKIAOLD")
    return path


def write_key(path: Path, key: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


def nowhere_given(proxy: Any, bucket: str, **fields: object) -> ImageStore:
    """A store that leaves its credentials to AWS's chain."""
    return ImageStore(url=f"s3://{bucket}", endpoint_url=proxy.url, region="us-east-1", **fields)


def test_credentials_that_expire_are_asked_for_anew(s3_server: S3Server, key_file: Path) -> None:
    """A key file that somebody renews in mid-batch is read again, once, whatever was being done, conditional or not."""
    gate = Gate("AKIAOLD")
    with meddling_proxy(s3_server.url, gate) as proxy:
        store = nowhere_given(proxy, s3_server.new_bucket())
        image = stored(store)
        for number, act in enumerate(
            (
                lambda: store.missing([image]),
                lambda: store.read_bytes(image.uri),
                lambda: store.compare_and_swap("ledger/a.json", b"{}", None),
                lambda: list(store.list("")),
            )
        ):
            gate.good = {f"AKIANEW{number}"}
            write_key(key_file, f"AKIANEW{number}")
            gate.refused.clear()
            act()
            # botocore follows a refused HEAD with a look for the bucket's region
            assert len(gate.refused) == (2 if gate.refused[0] == "HEAD" else 1)


def test_many_threads_renew_at_once(s3_server: S3Server, key_file: Path) -> None:
    """Of many requests that find the credentials expired, all succeed, each after one refusal at most."""
    gate = Gate("AKIAOLD")
    with meddling_proxy(s3_server.url, gate) as proxy, ThreadPoolExecutor(12) as threads:
        store = nowhere_given(proxy, s3_server.new_bucket())
        stored(store)
        gate.good = {"AKIANEW"}
        write_key(key_file, "AKIANEW")
        images = list(threads.map(lambda number: stored(store, b"%d" % number), range(12)))
        assert store.missing(images) == []
        assert len(gate.refused) <= 12


def test_credentials_that_stay_expired_are_an_error(s3_server: S3Server, key_file: Path) -> None:
    """Where asking again gives the same old key, one line says so; the block's own keys are not asked for twice."""
    gate = Gate()
    with meddling_proxy(s3_server.url, gate) as proxy:
        bucket = s3_server.new_bucket()
        own = {"access_key_id": "AKIAMINE", "secret_access_key": "secret"}
        for fields, tries in (({}, 2), (own, 1)):
            gate.refused.clear()
            with pytest.raises(StoreError, match="have expired: renew them"):
                nowhere_given(proxy, bucket, **fields).read("x")
            assert len(gate.refused) == tries


@dataclass(unsafe_hash=True)
class Assumed:
    """What is used of a block of prefect-aws, for a role whose credentials are other ones each time."""

    region_name: str | None = "us-east-1"
    endpoint_url: str | None = None
    asked: list[str] = field(default_factory=list, hash=False)

    @property
    def aws_client_parameters(self) -> SimpleNamespace:
        return SimpleNamespace(endpoint_url=self.endpoint_url, verify=None, verify_cert_path=None)

    def get_boto3_session(self) -> boto3.Session:
        self.asked.append(f"AKIAROLE{len(self.asked)}")
        return boto3.Session(self.asked[-1], "secret", "token")


def test_a_blocks_role_is_assumed_again_when_it_has_expired(
    s3_server: S3Server, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, region and endpoint come from a block that has them, before the environment; expired ones are renewed."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    gate = Gate("AKIAROLE0")
    with meddling_proxy(s3_server.url, gate) as proxy:
        block = Assumed(endpoint_url=proxy.url)
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", aws_credentials=block)
        assert store.identity.endswith(f" at {proxy.url}")
        store.write("a", b"a", "text/plain")
        gate.good = {"AKIAROLE1"}
        put = store.objects.write
        put("b", lambda: io.BytesIO(b"b"), Facts("text/plain"), Condition.NOTHING)
        assert block.asked == ["AKIAROLE0", "AKIAROLE1"]
        assert gate.used == {"AKIAROLE0", "AKIAROLE1"}


class Empty(Assumed):
    """A block that has nothing to give."""

    def get_boto3_session(self) -> Any:
        return SimpleNamespace(get_credentials=lambda: None)


def test_a_block_without_credentials_is_one_clear_line() -> None:
    """The error says what is missing, and nothing else complains."""
    store = ImageStore(url="s3://pictures", aws_credentials=Empty())
    with pytest.raises(StoreError, match="from aws_credentials: the block has none"):
        store.read("a")


def test_a_block_shows_nothing_of_its_credentials(s3_server: S3Server) -> None:
    """A store that holds a block shows nothing of it, and can't be mistaken for one that has keys."""
    store = ImageStore(url="s3://pictures", aws_credentials=Assumed())
    assert "aws_credentials" not in repr(store)
    assert "AKIA" not in repr(store._bucket())
    with pytest.raises(ValidationError, match="not both"):
        ImageStore(url="s3://pictures", aws_credentials=Assumed(), **s3_server.settings())
    assert pickle.loads(pickle.dumps(store)).aws_credentials == Assumed()


class SavedKeys(Block):
    """A block that is saved, with what is used of prefect-aws's."""

    _block_type_slug = "saved-keys"

    region_name: str | None = "eu-central-1"
    key: str = "AKIASAVED"

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def aws_client_parameters(self) -> SimpleNamespace:
        return SimpleNamespace(endpoint_url="https://saved.example.com", verify=False, verify_cert_path=None)

    def get_boto3_session(self) -> boto3.Session:
        return boto3.Session(self.key, "secret")


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_block_is_known_by_its_name(key_file: Path) -> None:
    """A store keeps the name of a saved block, and finds it again, also where an event loop is running."""
    SavedKeys().save("keys-of-the-shop", overwrite=True)
    given = ImageStore(url="s3://pictures", aws_credentials=SavedKeys.load("keys-of-the-shop"))
    assert given.model_dump()["aws_credentials"] == "saved-keys/keys-of-the-shop"

    async def looked_up() -> Account:
        return (
            ImageStore(url="s3://pictures", aws_credentials="saved-keys/keys-of-the-shop")._bucket().account
        )

    account = asyncio.run(looked_up())
    assert account == given._bucket().account
    assert (account.region, account.endpoint_url, account.verify) == (
        "eu-central-1",
        "https://saved.example.com",
        False,
    )
    assert account.find_keys()[:2] == ("AKIASAVED", "secret")
    with pytest.raises(StoreError, match="can't load the block saved-keys/none"):
        ImageStore(url="s3://pictures", aws_credentials="saved-keys/none").identity  # noqa: B018


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_block_that_was_changed_is_refused() -> None:
    """By its name, the store would have the keys, or the service, that are saved."""
    SavedKeys().save("changed-keys", overwrite=True)
    block = SavedKeys.load("changed-keys")
    block.region_name = "eu-west-3"
    with pytest.raises(
        ValidationError, match=r"saved-keys/changed-keys has another region_name than is saved"
    ):
        ImageStore(url="s3://pictures", aws_credentials=block)


class Slow(Assumed):
    """A block whose credentials take their time, as an assumed role's do."""

    asking = threading.Event()
    enough = threading.Event()

    def get_boto3_session(self) -> boto3.Session:
        self.asking.set()
        self.enough.wait(30)
        return super().get_boto3_session()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # it is what the test is about
def test_a_fork_while_credentials_are_asked_for_works(s3_server: S3Server) -> None:
    """A child that was forked while another thread made a client makes its own, and waits for nobody."""
    url = f"s3://{s3_server.new_bucket()}"
    store = ImageStore(url=url, **s3_server.settings(access_key_id="AKIAFORK"))
    slow = ImageStore(url=url, aws_credentials=Slow(endpoint_url=s3_server.url))
    thread = threading.Thread(target=slow.read, args=("a",))
    thread.start()
    assert Slow.asking.wait(30)
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            store.write("a", b"written", "text/plain")
            os._exit(0)
        os._exit(1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    Slow.enough.set()
    thread.join()
    assert ended == (child, 0)
    assert store.read("a") == b"written"
