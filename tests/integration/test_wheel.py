"""What people install: the wheel, in an empty environment, away from the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefect_ttapi.results import VERSION
from tests.support.prefect_server import ROOT, Server

pytestmark = pytest.mark.integration

#: Run where nothing but the wheel is installed: what other programs find of us.
FOUND = """
import prefect_ttapi
from importlib.metadata import distribution, entry_points
from importlib.resources import files
package = files("prefect_ttapi")
assert "site-packages" in prefect_ttapi.__file__, prefect_ttapi.__file__
assert package.joinpath("py.typed").is_file()
page = package.joinpath("lineage", "page")
assert {file.name for file in page.iterdir()} >= {"page.html", "page.css", "page.js"}
assert "automations:" in package.joinpath("cli", "automations.yaml").read_text()
(collection,) = [point for point in entry_points(group="prefect.collections") if point.dist.name == "prefect-ttapi"]
assert {"ImageStore", "TTAPICredentials"} <= set(vars(collection.load())), "block types come with it"
assert all(hasattr(prefect_ttapi, name) for name in prefect_ttapi.__all__)
print(distribution("prefect-ttapi").version)
"""

FONT_LICENCE = "prefect_ttapi/images/letters.LICENSE"

BATCH = """
import sys
from prefect_ttapi import ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.sandbox import Sandbox
with Sandbox(tiny=True) as sandbox:
    credentials = TTAPICredentials(api_key="sandbox", base_url=sandbox.base_url)
    store, site = ImageStore(url="./images"), ImageStore(url="./website")
    requests = [{"prompt": f"a village in {season}"} for season in ("spring", "autumn")]
    report = generate_batch(requests, credentials, store, deliver_to=site, key="{slug}.{ext}")
    assert [row.status for row in report.rows] == ["generated"] * 2
    assert sandbox.paid == 2
"""


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel and what it needs; commands run in an empty folder."""

    folder: Path
    cwd: Path
    environment: dict[str, str]

    def run(self, program: str, *arguments: str) -> str:
        """Return what a program of the environment prints; it must succeed."""
        done = subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=self.cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def uv(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "uv", *words], check=True, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "-q", "--out-dir", folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, prefect_ui: Server, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own."""
    folder = tmp_path_factory.mktemp("environment")
    (wheel,) = built.glob("*.whl")
    uv("venv", "-q", "--clear", "--python", sys.executable, folder)
    uv("pip", "install", "-q", "--python", folder / "bin" / "python", "-c", "constraints.txt", wheel)
    environment = {name: value for name, value in prefect_ui.environment.items() if name != "PYTHONPATH"}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return Installed(folder, tmp_path_factory.mktemp("elsewhere"), environment | {"PATH": path})


def test_the_wheel_holds_the_package_and_the_source_distribution_all(built: Path) -> None:
    """A wheel brings no tests and tools into people's environments; the source distribution can run them."""
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert f"prefect_ttapi-{VERSION}.dist-info/licenses/{FONT_LICENCE}" in names
    assert tops == {"prefect_ttapi", f"prefect_ttapi-{VERSION}.dist-info"}
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held >= {
        "README.md",
        "LICENSE",
        FONT_LICENCE,
        "Makefile",
        "constraints.txt",
        "docs/versions.md",
        "tests/test_package.py",
    }


def test_what_other_programs_find(installed: Installed) -> None:
    """Entry points, types and page files are there, and every public name."""
    assert installed.run("python", "-c", FOUND).strip() == VERSION
    assert installed.run("prefect-ttapi", "--version").strip() == f"prefect-ttapi {VERSION}"


def test_type_checkers_read_its_types(installed: Installed) -> None:
    """mypy takes the types from the package, with nothing from the source tree."""
    code = "from prefect_ttapi.requests import ImageRequest; reveal_type(ImageRequest.request_hash)"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--python-executable",
            installed.folder / "bin" / "python",
            "-c",
            code,
        ],
        cwd=installed.cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "untyped" not in done.stdout
    assert "ImageRequest) -> str" in done.stdout, done.stdout + done.stderr


def test_blocks_are_registered_and_a_batch_runs(installed: Installed, prefect_ui: Server) -> None:
    """The block types are on the server, a batch against the sandbox is paid for and in order, its gallery written."""
    told = installed.run("prefect", "block", "register", "-m", "prefect_ttapi")
    assert "TTAPI Credentials" in told
    assert "TTAPI Image Store" in told
    slugs = {block["slug"] for block in prefect_ui.ask("block_types/filter")}
    assert slugs >= {"ttapi-credentials", "ttapi-image-store"}
    installed.run("python", "-c", BATCH)
    assert len(list((installed.cwd / "website").glob("a-village-in-*.png"))) == 2
    assert len(list((installed.cwd / "images" / "batches").glob("*/index.html"))) == 1
    installed.run("prefect-ttapi", "verify", "./images")
