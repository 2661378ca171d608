"""Every Python example of README and documentation runs as it stands, against the sandbox and a stand-in for S3.

So does every shell command of the pages about operation.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
from contextlib import closing
from itertools import groupby
from pathlib import Path
from textwrap import dedent

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.settings import get_current_settings

from prefect_ttapi.cli.main import main
from prefect_ttapi.sandbox import Sandbox
from tests.support.s3 import S3Server
from tests.test_earlier_versions import ARCHIVE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: A block of code, perhaps in a list: its language, the file that it is the content of, and what is in it.
BLOCK = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)

#: Of the pages in this folder, shell commands run as well.
OPERATION = Path("docs/operate")


def blocks_of(page: Path) -> list[tuple[str, str, str]]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(kind, title, dedent(code)) for _, kind, title, code in found]


BLOCKS = {page.relative_to(ROOT): blocks_of(page) for page in PAGES}
WITH_PYTHON = {
    page: blocks
    for page, blocks in BLOCKS.items()
    if {"python", "sh" if page.parent == OPERATION else "python"} & {kind for kind, *_ in blocks}
}
BIN = str(Path(sys.executable).parent)
OURS = re.compile(r"prefect-ttapi [^$|<>]+")

#: The README and the first page in each run of the tests, the others with the integration tests.
AT_THE_DOOR = ("README.md", "docs/start.md")
EXAMPLES = [
    pytest.param(page, id=str(page), marks=[pytest.mark.integration] * (str(page) not in AT_THE_DOOR))
    for page in WITH_PYTHON
]

BUCKETS = ("acme-images", "acme-shop")
LIMIT = "ttapi-account"


@pytest.fixture
def surroundings(
    sandbox: Sandbox, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader has: a folder, a key, buckets, and the concurrency limit that one page makes."""
    monkeypatch.chdir(tmp_path)
    environment = {
        "TTAPI_BASE_URL": sandbox.base_url,
        "TTAPI_API_KEY": "sandbox",
        "AWS_ENDPOINT_URL_S3": s3_server.url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": s3_server.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret_access_key,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with closing(s3_server.client()) as s3:
        for bucket in BUCKETS:
            s3.create_bucket(Bucket=bucket)


def earlier_store(folder: Path) -> None:
    """Put the store that version 0.1.0 wrote there."""
    with tarfile.open(ARCHIVE) as archive:
        members = [member for member in archive.getmembers() if member.name.startswith("store")]
        archive.extractall(folder.parent, members, filter="data")
    (folder.parent / "store").rename(folder)


def run_commands(code: str) -> None:
    """Run shell commands, each of which must succeed; plain ones of our program in this process, to save its start."""
    for ours, lines in groupby(code.splitlines(), lambda line: OURS.fullmatch(line) is not None):
        if not ours:
            run_in_a_shell("\n".join(lines))
            continue
        for line in lines:
            assert main(shlex.split(line)[1:]) == 0, line


def run_in_a_shell(code: str) -> None:
    """Run commands, each of which must succeed, with this Python's programs and the Prefect server of the tests."""
    mine = {"PATH": f"{BIN}:{os.environ['PATH']}", "PREFECT_API_URL": str(get_current_settings().api.url)}
    path = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        ["bash", "-eux", "-o", "pipefail", "-c", code],
        env=os.environ | mine | path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# what Prefect's notification blocks import
@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("prefect_server", "surroundings")
@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page: Path) -> None:
    """A page's files are written and its Python runs, from top to bottom, in one namespace."""
    if any(LIMIT in code for _, _, code in WITH_PYTHON[page]):
        with get_client(sync_client=True) as client:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=16))
    if page.name == "upgrade.md":
        earlier_store(Path("images"))
    namespace = {"__name__": "example"}
    for number, (kind, title, code) in enumerate(WITH_PYTHON[page]):
        if title:
            Path(title).write_text(code, encoding="utf-8")
        elif kind == "python":
            exec(compile(code, f"{page}, block {number}", "exec"), namespace)  # noqa: S102
        elif kind == "sh" and page.parent == OPERATION:
            run_commands(code)
    if page.name == "README.md":
        assert {path.name for path in Path("website/seasons").iterdir()} > {"a-village-in-spring.png"}


def test_there_are_examples() -> None:
    """Pages have Python examples at all."""
    assert Path("README.md") in WITH_PYTHON
    assert len(WITH_PYTHON) > 8
