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
from typing import Any, Final

from prefect_ttapi.images.spool import Spool
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import DeliveredImage, StoredImage

#: Rows that are in memory at a time, and in one of the file's row groups.
ROW_GROUP: Final = 500

_LARGEST: Final = 2**63 - 1  # tokens are counted by somebody else

#: Column or field, and its type: the name of a function of pyarrow's, a list of one, or the fields of a struct.
_REQUEST: Final = dict.fromkeys(ImageRequest.model_fields, "string") | {
    "n": "int64",
    "output_compression": "int64",
    "partial_images": "int64",
    "stream": "bool_",
}
_IMAGE: Final = dict.fromkeys(StoredImage.model_fields, "string") | {
    "size_bytes": "int64",
    "width": "int64",
    "height": "int64",
    "index": "int64",
}
_COPY: Final = dict.fromkeys(DeliveredImage.model_fields, "string") | {
    "size_bytes": "int64",
    "width": "int64",
    "height": "int64",
}
_USAGE: Final = {"input_tokens": "int64", "output_tokens": "int64", "total_tokens": "int64"}
_COLUMNS: Final[dict[str, Any]] = {
    "row": "int64",
    "status": "string",
    "request_hash": "string",
    **_REQUEST,
    "given": "string",
    "images": [_IMAGE],
    "delivered": [_COPY],
    "usage": _USAGE,
    "error": "string",
    "error_type": "string",
    "api_calls": "int64",
    "seconds": "float64",
    "created_at": "timestamp",
    "api_origin": "string",
    "flow_run_id": "string",
    "task_run_id": "string",
    "maybe_paid": ["string"],
    "also_paid": ["string"],
    "values": "map_",
    "ledger_tag": "string",
    "ledger_size": "int64",
}


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

    schema = pyarrow.schema([(name, _type(pyarrow, kind)) for name, kind in _COLUMNS.items()])
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
