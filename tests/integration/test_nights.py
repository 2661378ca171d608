"""Several nights of one campaign: what `costs`, the documented SQL and the API itself say that they cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import duckdb
import pytest

from prefect_ttapi import BatchReport, ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.cli.main import main
from prefect_ttapi.sandbox import Sandbox
from tests.support.prefect_server import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("prefect_server")]

#: The queries of the page, by their file.
SQL = dict(
    re.findall(
        r'^```sql title="(\w+\.sql)"\n(.*?)^```$', (ROOT / "docs/operate/costs.md").read_text(), re.M | re.S
    )
)
CUT = "[[sandbox:cut]] [[sandbox:times=1]]"
PROMPTS = [
    {"prompt": "a meadow", "model": "gpt-image-1"},
    {"prompt": "a meadow", "model": "gpt-image-1"},
    {"prompt": "two storms", "model": "gpt-image-2", "n": 2},
    {"prompt": "a heron", "model": "dall-e-3"},
    {"prompt": "refused [[sandbox:moderation]]", "model": "gpt-image-1"},
    {"prompt": "late [[sandbox:status=504]] [[sandbox:times=1]]", "model": "gpt-image-1"},
    {"prompt": f"torn {CUT}", "model": "gpt-image-1"},
    {"prompt": "slow [[sandbox:status=500]] [[sandbox:times=1]]", "model": "gpt-image-1"},
]


def by_costs(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """What `costs` says, all models together."""
    capsys.readouterr()
    assert main(["costs", store.url, "--sandbox", "--json"]) == 0
    sums = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ("images", "calls", "tokens", "saved", "maybe_paid", "in_vain")
    return {name: sum(each[name] for each in sums) for name in names}


def by_sql() -> dict[str, int]:
    """What the ledger says, read as the page says."""
    duckdb.sql(SQL["ledger.sql"])
    (paid,) = duckdb.sql("SELECT sum(images), sum(calls), sum(usage.total_tokens) FROM paid").fetchall()
    doubt = dict(duckdb.sql("SELECT kind, count(*) FROM doubtful GROUP BY kind").fetchall())
    told = dict(zip(("images", "calls", "tokens"), map(int, paid), strict=True))
    return told | {"maybe_paid": doubt.get("maybe paid", 0), "in_vain": doubt.get("in vain", 0)}


def by_manifests() -> int:
    """Tokens that the manifests name, each payment once, read as the page says."""
    return int(sum(tokens or 0 for _, _, tokens in duckdb.sql(SQL["manifests.sql"]).fetchall()))


def test_every_count_agrees_with_the_apis_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sandbox: Sandbox,
    credentials: TTAPICredentials,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With caches, refusals, lost answers, refreshes and lost images; what is doubtful stands apart, call by call."""
    monkeypatch.chdir(tmp_path)
    store = ImageStore(url="images")

    def night(**options: Any) -> BatchReport:
        report = generate_batch(
            PROMPTS, credentials, store, name="nightly", raise_on_failure=False, **options
        )
        told = by_costs(store, capsys)
        saved = told.pop("saved")
        assert saved == sum(each.totals.images_cached for each in [*reports, report])
        if "refresh_cache" not in options:
            # of a server's fault that was sent again, only `costs` tells: it may be paid for as well
            assert told == by_sql() | {"maybe_paid": told["maybe_paid"]}
        reports.append(report)
        return report

    reports: list[BatchReport] = []
    first = night()
    assert first.totals.errors == {"ModerationError": 1, "UnknownOutcomeError": 2}
    told, torn = by_costs(store, capsys), 1
    assert (told["images"], told["in_vain"], told["maybe_paid"]) == (sandbox.images - torn, torn, 2)

    second = night()
    lost = sandbox.tokens - by_costs(store, capsys)["tokens"]
    assert second.totals.errors == {"ModerationError": 1}
    assert lost == second.rows[6].usage.total_tokens  # of the answer that was torn
    third = night()
    assert third.totals.cached == 7

    night(refresh_cache=True)
    image = third.rows[0].images[0]
    store.remove(store.objects.key(image.uri))
    fifth = night()
    assert fifth.totals.generated == 1

    told = by_costs(store, capsys)
    assert told["images"] == sandbox.images - torn
    assert told["tokens"] == sandbox.tokens - lost == by_sql()["tokens"] == by_manifests()
    # a payment for each paid call, but for the torn one, which is doubtful by now
    assert duckdb.sql("SELECT count(*) FROM paid").fetchall() == [(sandbox.paid - torn,)]
    assert told["in_vain"] + told["maybe_paid"] == 3
    assert main(["costs", "images", "--sandbox", "--price", "gpt-image-1=1", "--max-usd", "5"]) == 1
    assert "more than --max-usd 5.00" in capsys.readouterr().err
