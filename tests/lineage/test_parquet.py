"""The manifest as Parquet: the same rows, in columns with types."""

from __future__ import annotations

import json
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from prefect_ttapi.lineage.manifest import ROW_GROUP, Row, parquet_of
from prefect_ttapi.results import DeliveredImage, Usage
from tests.support.rows import failed, generated


def table_of(rows: list[Row]) -> pyarrow.Table:
    with parquet_of(row.line() for row in rows).open() as file:
        return parquet.read_table(file)


def read(rows: list[Row]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = table_of(rows).to_pylist()
    return made


def test_rows_are_the_same() -> None:
    """Whatever a row knows is in its columns: request, images, copies, tokens, errors, values, notes."""
    small = {"size_bytes": 9, "media_type": "image/webp", "width": 256, "height": 256, "rendition": "small"}
    copy = DeliveredImage(
        uri="s3://b/k", sha256="ab", source_uri="s3://b/i", recipe="webp 256", etag="t", **small
    )
    rows = [
        generated(
            0,
            "a lighthouse\u2028\U0001f468",
            count=2,
            delivered=[copy],
            values={"sku": "7"},
            ledger_tag="t",
            ledger_size=9,
        ),
        failed(1, maybe_paid=["sent twice"], also_paid=["by another run"]),
        Row(row=2, status="skipped"),
    ]
    first, second, third = read(rows)
    assert (first["prompt"], first["model"], first["n"]) == ("a lighthouse\u2028\U0001f468", "gpt-image-2", 1)
    assert first["images"] == [image.model_dump() for image in rows[0].images]
    assert first["delivered"] == [copy.model_dump()]
    assert first["usage"] == {"input_tokens": 9, "output_tokens": 4160, "total_tokens": 4169}
    assert (first["created_at"], first["seconds"]) == (rows[0].created_at, 21.5)
    assert (dict(first["values"]), first["ledger_tag"], first["ledger_size"]) == ({"sku": "7"}, "t", 9)
    assert (second["status"], second["error_type"]) == ("failed", "ModerationError")
    assert (second["maybe_paid"], second["also_paid"]) == (["sent twice"], ["by another run"])
    assert (third["row"], third["prompt"], third["images"], third["usage"]) == (2, None, [], None)


def test_nulls_are_nulls() -> None:
    """A value that was null, or pandas' NaN, is no text "None" in manifest and column."""
    row = generated(0, "x", values={"sku": None, "price": float("nan"), "n": 0, "name": ""})
    assert row.values == {"sku": None, "price": None, "n": "0", "name": ""}
    assert b'"sku":null,"price":null' in row.line()
    assert dict(read([row])[0]["values"]) == row.values


def test_an_illegal_item_is_found_again() -> None:
    """What was given is JSON in a column of its own; prompt and model are in theirs where they are text."""
    item = {"prompt": "wide", "model": 7, "n": "many", "extra": {"a": [1]}}
    (row,) = read([Row(row=0, status="failed", given=item, error="size: is 9x9")])
    assert json.loads(row["given"]) == item
    assert (row["prompt"], row["model"], row["n"]) == ("wide", None, None)


def test_more_tokens_than_a_column_holds() -> None:
    """A count that no 64 bits hold does not cost the table."""
    (row,) = read([generated(0, usage=Usage(total_tokens=10**30))])
    assert row["usage"]["total_tokens"] == 2**63 - 1


@pytest.mark.parametrize("count", [0, 1, ROW_GROUP + 1])
def test_types_do_not_depend_on_the_rows(count: int) -> None:
    """Any number of rows, also none, has the same columns, and is written a row group at a time."""
    table = table_of([generated(n) for n in range(count)])
    assert table.num_rows == count
    assert table.schema == table_of([failed(0)]).schema
    assert str(table.schema.field("created_at").type) == "timestamp[us, tz=UTC]"
    assert "index: int64" in str(table.schema.field("images").type)


def test_every_field_of_a_row_has_its_column() -> None:
    """A field that a row gains must be given a column; only the request is split into its own."""
    columns = set(table_of([]).schema.names)
    assert set(Row.model_fields) - {"request"} <= columns
