"""What all tests share: a sandbox, credentials for it, stores in folders, and one Prefect server for the session."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from prefect.settings import (
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW,
    temporary_settings,
)
from prefect.testing.utilities import prefect_test_harness

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.s3 import new_bucket, s3_server, s3_store  # noqa: F401 - fixtures

# a busy machine is slow: no test is to fail for that
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

#: Fixtures that take long to start, so that one worker has all the tests that ask for them.
SERVERS = ("prefect_server", "prefect_ui", "ceph")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a test by what stays the same: a workbook's bytes hold the second it was made, and workers compare names."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a server are one worker's.

    Those with a Prefect server come last where there is one worker: its threads open files under all that follows.
    Prefect leaves sockets to its server to the garbage collector; only these tests may.
    """
    items.sort(key=lambda item: "prefect_server" in getattr(item, "fixturenames", ()))
    forgiven = (
        "ignore:unclosed:ResourceWarning",
        "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning",
    )
    for item in items:
        names = getattr(item, "fixturenames", [])
        of_its_file = [item.path.name] if item.get_closest_marker("integration") else []
        if group := next(iter([server for server in SERVERS if server in names] + of_its_file), None):
            item.add_marker(pytest.mark.xdist_group(group))
        if "prefect_server" in names:
            names.append("collected_at_once")
            for warning in forgiven:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session", autouse=True)
def rescue_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where images are kept that a store would not take, away from the user's own."""
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_STATE_HOME", str(state))
        yield state / "prefect-ttapi" / "rescue"


@pytest.fixture
def collected_at_once() -> Iterator[None]:
    """What a test leaves to the garbage collector is collected before the next test begins."""
    yield
    gc.collect()
    # what is alive now is not looked at again: Prefect's heap takes two seconds
    gc.freeze()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server of the test session's own; it takes about 20 s to start, so there is one."""
    changed = {
        PREFECT_LOCAL_STORAGE_PATH: tmp_path_factory.mktemp("results"),
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW: "ignore",
        # each flow waits up to a second for its end
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
    }
    with temporary_settings(changed), prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(tiny=True) as sandbox:
        yield sandbox


@pytest.fixture
def credentials(sandbox: Sandbox) -> TTAPICredentials:
    return TTAPICredentials(api_key="sandbox-key", base_url=sandbox.base_url)


@pytest.fixture
def sandbox_in_the_environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the API from the environment takes the sandbox."""
    monkeypatch.setenv("TTAPI_BASE_URL", sandbox.base_url)
    monkeypatch.setenv("TTAPI_API_KEY", "sandbox-key")


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[TTAPIClient]:
    with TTAPIClient("sandbox-key", sandbox.base_url) as client:
        yield client


@pytest.fixture
def store(folder_store: ImageStore) -> ImageStore:
    return folder_store


@pytest.fixture
def shop(tmp_path: Path) -> ImageStore:
    return ImageStore(url=str(tmp_path / "shop"))


@pytest.fixture
def folder_store(tmp_path: Path) -> ImageStore:
    """A store in a folder that does not exist yet."""
    return ImageStore(url=str(tmp_path / "store"))


@pytest.fixture(params=["folder", "s3"])
def each_store(request: pytest.FixtureRequest) -> ImageStore:
    """The test runs on each kind of store."""
    return request.getfixturevalue(f"{request.param}_store")
