"""Write the manifest as Parquet, for pandas, DuckDB and their like: the same rows, with columns that have types.

Needs pyarrow, which comes with the extra `parquet`; it is imported when a manifest is written, and not before.

- `row`, `status`, `error`, `error_type`, `seconds` and the like: as in the manifest; `created_at` is a time stamp, UTC.
- `prompt`, `model`, `n`, `size` and the like: the request's fields, one column each; of an illegal item, which is in
  `given` as JSON, prompt and model if they are text.
- `images`: a list of structs: `uri`, `sha256`, `size_bytes`, `media_type`, `width`, `height`, `index`,
  `revised_prompt`.
- `delivered`: a list of structs: `uri`, `url`, `sha256`, `source_uri`, `size_bytes`, `media_type`, `width`, `height`,
  `rendition`, `recipe`, `etag`.
- `usage`: a struct: `input_tokens`, `output_tokens`, `total_tokens`.
- `maybe_paid`, `also_paid`: lists of text; `values`: a map from text to text.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
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

#: Functions of pyarrow's that make the types of fields; what is not in here is text.
_TYPES: Final[dict[Any, str]] = {int: "int64", float: "float64", bool: "bool_", datetime: "timestamp"}


def _kind(annotation: Any) -> Any:
    """Return a field's type: the name of a function of pyarrow's, a list of one, or the fields of a struct."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, Union, UnionType):
        return _kind(arguments[0])
    if origin is tuple:
        return [_kind(arguments[0])]
    if origin is dict:
        return "map_"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _kinds(annotation)
    return _TYPES.get(annotation, "string")


def _kinds(model: type[BaseModel]) -> dict[str, Any]:
    return {name: _kind(field.annotation) for name, field in model.model_fields.items()}


_USAGE: Final = ("input_tokens", "output_tokens", "total_tokens")


def _columns() -> dict[str, Any]:
    """Return the columns of a row, with those of its request in the place of it."""
    mine = _kinds(Row) | {"given": "string", "usage": dict.fromkeys(_USAGE, "int64")}
    pairs = [
        pair for name in mine for pair in (mine[name].items() if name == "request" else [(name, mine[name])])
    ]
    return dict(pairs)


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

    schema = pyarrow.schema([(name, _type(pyarrow, kind)) for name, kind in _columns().items()])
    rows = (_flat(json.loads(line)) for line in lines)
    spool = Spool()
    with _Sink(spool) as sink, parquet.ParquetWriter(sink, schema) as writer:
        for group in _groups(rows):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
    return spool


def _type(pyarrow: Any, kind: Any) -> Any:
    if isinstance(kind, dict):
        return pyarrow.struct([(name, _type(pyarrow, inner)) for name, inner in kind.items()])
    if isinstance(kind, list):
        return pyarrow.list_(_type(pyarrow, kind[0]))
    arguments = {"timestamp": ("us", "UTC"), "map_": (pyarrow.string(), pyarrow.string())}
    return getattr(pyarrow, kind)(*arguments.get(kind, ()))


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


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while group := list(islice(rows, ROW_GROUP)):
        yield group


class _Sink(io.RawIOBase):
    """A spool as a file that pyarrow can write to."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._spool.write(data)
        return len(data)
