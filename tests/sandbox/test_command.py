"""`python -m prefect_ttapi sandbox`: what it prints, how it ends, and what it refuses."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack

import httpx
import pytest

from prefect_ttapi.cli.main import main


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(number: signal.Signals) -> None:
    """It prints what to export, answers with those settings, and ends with status 0 and its counts."""
    command = [
        sys.executable,
        "-m",
        "prefect_ttapi",
        "sandbox",
        "--port",
        "0",
        "--tiny",
        "--api-key",
        "s3cret",
    ]
    options = ["--fail", "402:0.5", "--fail", "timeout:0.5", "--latency", "0-0.01", "--seed", "5"]
    with (
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process,
        ExitStack() as cleanup,
    ):
        cleanup.callback(process.kill)
        assert process.stdout is not None
        printed = "".join(process.stdout.readline() for _ in range(5))
        [base_url] = re.findall(r"export TTAPI_BASE_URL=(http://127\.0\.0\.1:\d+/sandbox)\n", printed)
        assert "export TTAPI_API_KEY=" in printed
        assert "s3cret" not in printed
        url = f"{base_url}/v1/images/generations"
        with httpx.Client(headers={"TT-API-KEY": "s3cret"}) as client:
            statuses = {client.post(url, json={"prompt": f"{n}"}).status_code for n in range(12)}
            assert statuses == {402, 504}
            assert client.post(url, json={"prompt": "x"}, headers={"TT-API-KEY": "x"}).status_code == 401
        process.send_signal(number)
        assert process.stdout.read() == "13 calls, 0 of them answered with images.\n"
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sandcastle"], "sandcastle"),
        (["sandbox", "--port", "99999"], "99999"),
        (["sandbox", "--port", "-1"], "-1"),
        (["sandbox", "--fail", "429"], "429:0.1"),
        (["sandbox", "--fail", "418:0.1"], "418"),
        (["sandbox", "--fail", "429:2"], "0 to 1"),
        (["sandbox", "--latency", "soon"], "soon"),
        (["sandbox", "--latency", "2-1"], "latency"),
        (["sandbox", "--items", "both"], "both"),
        (["sandbox", "--image-bytes", "0"], "1 GiB"),
        (["sandbox", "--room", "0"], "room"),
        (["sandbox", "--unknown"], "--unknown"),
    ],
)
def test_bad_arguments_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake is status 2 and one line that names it."""
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert says in printed.err


def test_a_busy_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that is taken is status 2 and one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["sandbox", "--port", str(taken.getsockname()[1])]) == 2
    assert re.fullmatch(r"error: .*in use.*\n", capsys.readouterr().err)


def test_help_names_the_failures(capsys: pytest.CaptureFixture[str]) -> None:
    """--help is status 0 and lists every failure that can be asked for."""
    assert main(["sandbox", "--help"]) == 0
    assert {"moderation", "cut", "hang", "524"} <= set(re.findall(r"\w+", capsys.readouterr().out))
