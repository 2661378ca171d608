"""The manifest: rows survive writing and reading, and are read when asked for."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from prefect_ttapi.errors import StoreError
from prefect_ttapi.lineage.manifest import Row, RowFile, Rows, read_manifest
from prefect_ttapi.lineage.report import BatchReport, Totals
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import Generation, Usage
from tests.support.rows import failed, generated, manifest_of, stored

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.sampled_from(["\ud800", "a\nb\u2028c\x00", "</script>", "\U0001f468\u200d\U0001f469"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def manifest(count: int) -> bytes:
    return manifest_of(generated(n, f"prompt {n}") for n in range(count))


@given(
    prompt=st.text(min_size=1, max_size=200).filter(str.strip),
    error=st.text(st.characters()),
    item=ANYTHING,
    values=st.dictionaries(st.text(max_size=9), ANYTHING, max_size=3),
)
def test_rows_survive(prompt: str, error: str, item: object, values: dict[str, object]) -> None:
    """Whatever prompts, errors and illegal items hold, each row is one line and reads back equal."""
    rows = [
        generated(0, prompt, values=values),
        failed(1, prompt, error=error, maybe_paid=[error]),
        Row(row=2, status="failed", given=item, error=error, error_type="ValidationError"),
    ]
    lines = [row.line() for row in rows]
    assert [line.count(b"\n") for line in lines] == [1, 1, 1]
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2]
    assert list(read_manifest(lines)) == rows


def test_an_illegal_item_is_found_again() -> None:
    """What was given stays as it was where JSON can hold it, and by its repr where it can't."""
    item = {"prompt": "x", "n": 99, "size": math.inf, 7: {"deep": [SecretStr("hidden"), "\ud800"]}}
    row = Row(row=0, status="failed", given=item)
    expected = {"prompt": "x", "n": 99, "size": "inf", "7": {"deep": ["SecretStr('**********')", "\ufffd"]}}
    assert row.given == expected
    assert (row.prompt, row.model) == ("x", "")
    assert Row(row=0, status="failed", given="no mapping").given == {"item": "no mapping"}
    assert Row(row=0, status="failed", given={"prompt": 7}).prompt == ""


def test_a_deep_item_is_cut() -> None:
    """An item nested a thousand deep gives a short line, not a recursion error."""
    item: object = "x"
    for _ in range(1_000):
        item = [item]
    assert len(Row(row=0, status="failed", given=item).line()) < 2_000


def test_a_long_number_is_cut() -> None:
    """A whole number that JSON readers would refuse does not make the manifest unreadable."""
    row = Row(row=0, status="failed", given={"n": 10**5_000, "seed": 2**63})
    assert row.given == {"n": "<int>", "seed": 2**63}
    assert list(read_manifest([row.line()])) == [row]


def test_an_unhelpful_prompt_is_not_echoed() -> None:
    """The error of a line that is no row names the line, not the prompts in it."""
    lines = [generated(0).line(), b'{"row": 1, "status": "a secret prompt"}\n']
    rows = read_manifest(lines)
    next(rows)
    with pytest.raises(ValueError, match="line 2 of the manifest is no row") as error:
        next(rows)
    assert "secret" not in str(error.value)


def test_newer_fields_are_left_out() -> None:
    """A manifest that a newer version wrote is still readable."""
    line = json.loads(generated(3).line()) | {"colour": "new"}
    assert list(read_manifest([json.dumps(line)])) == [generated(3)]


def test_a_cached_row_has_paid_nothing() -> None:
    """A row made from an earlier answer keeps its tokens but claims no calls and no seconds."""
    request = ImageRequest(prompt="a lighthouse")
    generation = Generation(
        request=request,
        request_hash=request.request_hash,
        api_origin="https://api.ttapi.io",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        images=(stored(),),
        usage=Usage(total_tokens=5),
        api_calls=2,
        seconds=30.0,
        task_run_id="t",
    )
    paid = Row.of(0, generation, values={"sku": "7"})
    assert (paid.api_calls, paid.seconds, paid.task_run_id, paid.values) == (2, 30.0, "t", {"sku": "7"})
    cached = Row.of(1, generation, "cached")
    assert (cached.api_calls, cached.seconds, cached.usage) == (0, 0.0, Usage(total_tokens=5))
    assert cached.images == generation.images


def test_rows_are_a_sequence() -> None:
    """Length, positions from both ends, slices of slices and iteration agree with a list of the rows."""
    lines = [*manifest(12).splitlines(), b"\n"]
    rows = Rows(RowFile(lines))
    expected = list(read_manifest(lines))
    assert len(rows) == 12
    assert list(rows) == expected
    assert rows[3] == expected[3]
    assert rows[-1] == expected[-1]
    assert list(rows[2:9][::-2]) == expected[2:9][::-2]
    assert len(rows[20:]) == 0
    assert list(reversed(rows)) == expected[::-1]
    assert expected[4] in rows
    assert repr(rows) == "<12 rows of a manifest>"
    with pytest.raises(IndexError):
        rows[12]


def test_rows_of_an_empty_manifest() -> None:
    """A batch without requests has a manifest without rows."""
    rows = Rows(RowFile())
    assert not rows
    assert list(rows) == []


def test_the_manifest_is_read_once(tmp_path: Path) -> None:
    """A report reads it when its rows are asked for, and not again; it may be gone afterwards."""
    path = tmp_path / "batches" / "1" / "manifest.jsonl"
    told = {"name": "b", "flow_run_id": "1", "totals": Totals(), "gallery_uri": None, "seconds": 1.0}
    report = BatchReport(manifest_uri=path.as_uri(), **told)
    with pytest.raises(StoreError):
        report.rows  # noqa: B018
    path.parent.mkdir(parents=True)
    path.write_bytes(manifest(100))
    rows = report.rows
    path.unlink()
    assert len(rows) == 100
    assert rows[57].row == 57
    assert [row.row for row in rows[90:]] == list(range(90, 100))
    assert [row.row for row in rows] == list(range(100))
    assert report.rows is rows


def test_what_is_used_again_keeps_all_that_is_known_of_the_images() -> None:
    """A row used again resets what its batch did; every other field stays, those of later versions too."""
    row = generated(
        3,
        maybe_paid=("run 1",),
        also_paid=("run 2",),
        values={"sku": "7"},
        ledger_tag="t",
        ledger_size=9,
        error="a disk is full",
        error_type="StoreError",
    )
    again = row.again(8, values={"sku": 8})
    reset = {"row": 8, "status": "cached", "values": {"sku": "8"}, "api_calls": 0, "seconds": 0.0}
    reset |= {"delivered": (), "error": None, "error_type": None, "given": None}
    assert again.model_dump() == row.model_dump() | reset
    assert row.delivered
    assert row.api_calls


class LaterRow(Row):
    """A row of a later version, with one more column."""

    camera: str | None = None


def test_a_new_column_is_not_lost() -> None:
    """What is added to a row, and not marked as its batch's, is there where the row is used again."""
    row = LaterRow(row=0, status="generated", camera="f/8")
    assert row.again(1).camera == "f/8"
