"""The example of an account-wide cap, with Prefect's own concurrency limit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from flows.account_wide import account_wide
from prefect_ttapi import BatchReport
from prefect_ttapi.sandbox import Sandbox

#: A limit of this file's own: the examples of the pages make the one of the example's default.
ACCOUNT = "ttapi-two-batches"

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    with Sandbox(tiny=True, latency=0.2) as running:
        monkeypatch.setenv("TTAPI_BASE_URL", running.base_url)
        monkeypatch.setenv("TTAPI_API_KEY", "sandbox-key")
        yield running


def test_two_batches_share_the_account(sandbox: Sandbox, tmp_path: Path) -> None:
    """Without the limit nothing is sent; with it, two batches that ask for 3 of 3 slots never have more than 3 requests
    in flight together."""
    files = []
    for name in ("cats", "dogs"):
        prompts = tmp_path / f"{name}.csv"
        prompts.write_text("prompt,model\n" + "".join(f"{name} {n},gpt-image-1\n" for n in range(6)))
        files.append(str(prompts))

    def run(prompts: str) -> BatchReport:
        return account_wide(prompts, str(tmp_path / "store"), ACCOUNT, max_in_flight=3)

    with pytest.raises(Exception, match=ACCOUNT):
        run(files[0])
    assert sandbox.calls == 0
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=ACCOUNT, limit=3))
    with ThreadPoolExecutor(2) as threads:
        assert [report.ok for report in threads.map(run, files)] == [True, True]
    assert sandbox.paid == 12
    assert 1 <= sandbox.most_in_flight <= 3
