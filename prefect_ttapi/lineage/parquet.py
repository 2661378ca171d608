"""Write the manifest as Parquet, for pandas, DuckDB and their like: the same rows, with columns that have types.

Needs pyarrow, which comes with the extra `parquet`; it is imported when a manifest is written, and not before.

- `row`, `status`, `error`, `error_type`, `seconds` and the like: as in the manifest; `created_at` is a time stamp, UTC.
- `prompt`, `model`, `n`, `size` and the like: the request's fields, one column each; of an illegal item, which is in
  `given` as JSON, prompt and model if they are text.
- `images`: a list of structs: `uri`, `sha256`, `size_bytes`, `media_type`, `width`, `height`, `index`,
  `revised_prompt`, `marks`.
- `delivered`: a list of structs: `uri`, `url`, `sha256`, `source_uri`, `source_sha256`, `size_bytes`, `media_type`,
  `width`, `height`, `rendition`, `recipe`, `marks`, `etag`.
- `usage`: a struct: `input_tokens`, `output_tokens`, `total_tokens`.
- `maybe_paid`, `also_paid`: lists of text; `values`: a map from text to text.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from datetime import datetime
from importlib.util import find_spec
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel

from prefect_ttapi.images.spool import Spool
from prefect_ttapi.lineage.manifest import Row

#: Rows that are in memory at a time, and in one of the file's row groups.
ROW_GROUP: Final = 500

_LARGEST: Final = 2**63 - 1  # tokens are counted by somebody else

_USAGE: Final = ("input_tokens", "output_tokens", "total_tokens")


def installed() -> bool:
    """Return whether pyarrow is there."""
    return find_spec("pyarrow") is not None


def parquet_of(lines: Iterable[bytes]) -> Spool:
    """Return a manifest's lines as a Parquet file; one row group at a time is in memory.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import pyarrow
    from pyarrow import parquet

    schema = _schema(pyarrow)
    rows = (_flat(json.loads(line)) for line in lines)
    spool = Spool()
    with _Sink(spool) as sink, parquet.ParquetWriter(sink, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
    return spool


def _schema(pyarrow: Any) -> Any:
    """Return the columns of a row, with those of its request in the place of it."""
    usage = pyarrow.struct(dict.fromkeys(_USAGE, pyarrow.int64()).items())
    others = {"given": pyarrow.string(), "usage": usage}
    columns: list[Any] = []
    for name, kind in _fields(pyarrow, Row):
        columns += [*kind] if name == "request" else [(name, others.get(name, kind))]
    return pyarrow.schema(columns)


def _fields(pyarrow: Any, model: type[BaseModel]) -> list[tuple[str, Any]]:
    return [(name, _type(pyarrow, field.annotation)) for name, field in model.model_fields.items()]


def _type(pyarrow: Any, annotation: Any) -> Any:
    """Return the column type of a field; what is none of these is text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, Union, UnionType):
        return _type(pyarrow, arguments[0])
    if origin is tuple:
        return pyarrow.list_(_type(pyarrow, arguments[0]))
    if origin is dict:
        return pyarrow.map_(pyarrow.string(), pyarrow.string())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return pyarrow.struct(_fields(pyarrow, annotation))
    times = pyarrow.timestamp("us", "UTC")
    plain = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_(), datetime: times}
    return plain.get(annotation, pyarrow.string())


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest's line as the values of the columns; a field that is not there is null."""
    given, usage, at = row["given"], row["usage"], row["created_at"]
    legible = {
        name: value for name in ("prompt", "model") if isinstance(value := (given or {}).get(name), str)
    }
    return {
        **(row["request"] or legible),
        **row,
        "given": given and json.dumps(given, ensure_ascii=False),
        "usage": usage and {name: min(usage[name], _LARGEST) for name in _USAGE},
        "created_at": at and datetime.fromisoformat(at),
        "values": list(row["values"].items()),
    }


class _Sink(io.RawIOBase):
    """A spool as a file that pyarrow can write to."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._spool.write(data)
        return len(data)
