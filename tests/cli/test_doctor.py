"""Is everything there that a run needs?"""

from __future__ import annotations

import logging
import socket
import tempfile
from pathlib import Path

import pytest

from prefect_ttapi.cli.main import main
from prefect_ttapi.generation.rescue import RescueFolder
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.cli.test_cleaning import rescue
from tests.support.generations import API
from tests.support.rows import picture


def doctor(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = main(["doctor", *words])
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("sandbox_in_the_environment")
def test_all_is_well(each_store: ImageStore, sandbox: Sandbox, s3_server, capsys, monkeypatch) -> None:
    """Key, API, clock, both properties of the store and the missing server are told; nothing is sent with the key."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_access_key)
    endpoint = ["--endpoint-url", s3_server.url] if each_store.url.startswith("s3://") else []
    status, told = doctor("--store", each_store.url, *endpoint, capsys=capsys)
    names = [line.split()[1] for line in told if line.startswith("ok ")]
    assert names[:7] == ["versions", "key", "API", "clock", "store", "store", "rescue"]
    assert told[-1].split()[1] == "server"
    assert status == 0
    assert "sandbox-key" not in "".join(told)
    assert sandbox.calls == 0


def test_what_is_wrong_is_told_with_what_to_do(tmp_path: Path, capsys, monkeypatch) -> None:
    """A missing key, and a store that can't be: each is a line, the others are looked at all the same."""
    monkeypatch.delenv("TTAPI_API_KEY", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, told = doctor("--store", str(tmp_path / "file"), "--store", "gs://x", capsys=capsys)
    wrong = [line for line in told if line.startswith("wrong")]
    assert status == 1
    assert "TTAPI_API_KEY is not set" in wrong[0]
    assert str(tmp_path / "file") in wrong[1]
    assert "s3://" in wrong[2]
    status, told = doctor("--store", str(tmp_path / "store"), capsys=capsys)
    assert next(line for line in told if line.startswith("note ")).startswith(
        f"note  rescue   the rescue folder {tmp_path}/prefect-ttapi-"
    )


@pytest.mark.usefixtures("sandbox_in_the_environment")
def test_answers_that_wait_are_told(store: ImageStore, capsys) -> None:
    """What was paid for and waits on this machine is no good state, until a run has put it into the store."""
    waiting = RescueFolder(store, API, logging.getLogger())
    made = rescue(waiting, "a meadow", picture())
    status, told = doctor("--store", store.url, capsys=capsys)
    (line,) = [line for line in told if line.startswith("wrong")]
    assert status == 1
    assert f"1 paid answer waiting in {waiting.folder(made.request_hash).parent}" in line
    waiting.remove(made.request_hash)
    assert doctor("--store", store.url, capsys=capsys)[0] == 0


def test_an_api_that_is_not_there(capsys, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setenv("TTAPI_API_KEY", "k")
    monkeypatch.setenv("TTAPI_BASE_URL", url)
    status, told = doctor("-q", capsys=capsys)
    assert status == 1
    assert [line for line in told if not line.startswith(f"wrong API      {url} can't be reached")] == []
