"""What Docker and Compose are told is whole: files, settings and commands are there, which takes no engine to see."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import prefect.settings
import pytest
import yaml

from prefect_ttapi.generation.runs import GRACE

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "deployments/compose.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "deployments/Dockerfile").read_text(encoding="utf-8")
#: Each instruction of it, with what follows; lines that go on are one.
INSTRUCTIONS = [
    line.split(maxsplit=1) for line in re.sub(r"^#.*\n|\\\n", "", DOCKERFILE, flags=re.M).splitlines() if line
]
#: Read from the environment alone.
NO_SETTING = {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"}
#: Seconds that Prefect gives a run which it has told to end.
PREFECT_S_GRACE = 30


def told(instruction: str) -> list[str]:
    """What follows an instruction, each time that it stands in the Dockerfile."""
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def variables() -> dict[str, str]:
    """What the image sets."""
    return dict(pair.split("=", 1) for line in told("ENV") for pair in shlex.split(line))


def environments() -> list[dict[str, str]]:
    return [variables(), *(service.get("environment", {}) for service in COMPOSE["services"].values())]


def test_what_is_copied_is_there() -> None:
    """Each file that the image copies from the checkout exists, and is let through to the build."""
    ignored = (ROOT / "deployments/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [shlex.split(line)[:-1] for line in told("COPY")]
    sources = {source.rstrip("/") for sources in copied for source in sources}
    assert all((ROOT / source).exists() for source in sources)
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


@pytest.mark.integration
def test_the_wheel_is_built_of_what_is_copied(tmp_path: Path) -> None:
    """With the files that the image copies alone, the wheel has all files of the package."""
    for *sources, target in (shlex.split(line) for line in told("COPY")[:-1]):
        for source in (ROOT / each for each in sources):
            to = tmp_path / target / ("" if source.is_dir() else source.name)
            to.parent.mkdir(exist_ok=True)
            copy = partial(shutil.copytree, symlinks=True) if source.is_dir() else shutil.copy
            copy(source, to)
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("dist/*.whl")
    tracked = subprocess.check_output(["git", "ls-files", "prefect_ttapi"], cwd=ROOT, text=True).split()
    assert set(tracked) <= set(zipfile.ZipFile(wheel).namelist())


def test_the_image_runs_as_a_user_and_below_an_init() -> None:
    """The user is a number, which Kubernetes can tell from root's, and owns the volume of the rescue folder."""
    assert int(told("USER")[-1]) > 0
    assert json.loads(told("ENTRYPOINT")[-1]) == ["tini", "--"]
    assert told("VOLUME") == [variables()["XDG_STATE_HOME"]]
    assert f"install --directory --owner ttapi --group ttapi {told('VOLUME')[0]}" in " ".join(told("RUN"))
    (script,) = (word for word in json.loads(told("CMD")[-1]) if word.endswith(".py"))
    assert (ROOT / "deployments" / Path(script).name).exists()


def test_no_secret_is_in_a_file() -> None:
    """Secrets come from the environment of who starts the services, and Compose refuses to start without them."""
    assert not told("ARG")
    secret = re.compile("KEY|PASSWORD|SECRET|TOKEN")
    given = {name: value for each in environments() for name, value in each.items() if secret.search(name)}
    assert given.pop("AWS_ACCESS_KEY_ID") == COMPOSE["services"]["minio"]["environment"]["MINIO_ROOT_USER"]
    assert given.keys() >= {"TTAPI_API_KEY", "POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY"}
    assert all(re.fullmatch(r"\$\{\w+:\?\}", value) for value in given.values())


def test_settings_are_prefect_s() -> None:
    """A setting that is misspelt would be passed over in silence."""
    named = {name for each in environments() for name in each if name.startswith("PREFECT_")}
    assert [name for name in named - NO_SETTING if not hasattr(prefect.settings, name)] == []


def test_services_are_whole() -> None:
    """Images have versions, ports are this machine's alone, volumes exist, and a run may end before it is killed."""
    services: dict[str, dict[str, Any]] = COMPOSE["services"]
    volumes = [volume.split(":")[0] for each in services.values() for volume in each.get("volumes", ())]
    assert {volume for volume in volumes if not volume.startswith(".")} == COMPOSE["volumes"].keys()
    assert all(port.startswith("127.0.0.1:") for each in services.values() for port in each.get("ports", ()))
    for service in services.values():
        assert "build" in service or re.search(r":\S*\d+\.\d+|:RELEASE\.", service["image"])
        for needed, how in service.get("depends_on", {}).items():
            ends = how["condition"] == "service_completed_successfully"
            assert ends or services[needed]["healthcheck"]
    assert GRACE < PREFECT_S_GRACE < int(services["worker"]["stop_grace_period"].removesuffix("s"))
