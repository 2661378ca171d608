"""Write and read manifests: one JSON line, or row of a Parquet file, for each request of a batch, in order."""

from __future__ import annotations

import io
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, Union, get_args, get_origin, overload

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from prefect_ttapi.images.spool import Spool
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import DeliveredImage, Generation, StoredImage, Usage
from prefect_ttapi.storage.keys import is_null

Status = Literal["generated", "cached", "failed", "skipped"]

#: An illegal item is kept as given to this depth; what is no JSON by so many characters of its repr.
_DEPTH: Final = 8
_SHOWN: Final = 1_000
#: Longer whole numbers are more than JSON readers take.
_BITS: Final = 1_024

_CHUNK: Final = 256 * 1024

#: Values in the row of a batch that found its images there.
CACHED: Final = {"status": "cached", "api_calls": 0, "seconds": 0.0}

#: Rows that are in memory at a time, and in one of the Parquet file's row groups.
ROW_GROUP: Final = 500
_LARGEST: Final = 2**63 - 1  # tokens are counted by somebody else
TOKENS: Final = ("input_tokens", "output_tokens", "total_tokens")

#: Marks the fields of a row that tell of its own batch, and not of the images.
_OF_ITS_BATCH: Final = "of its batch"


def _well_formed(value: Any) -> Any:
    """Replace lone surrogates, which no file can hold, by U+FFFD."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _json_able(value: Any, depth: int = 0) -> JsonValue:
    """Return `value` as JSON can hold it; what is no JSON, or nested too deeply, by its repr."""
    if isinstance(value, str):
        return str(_well_formed(value))
    if value is None or (isinstance(value, int) and value.bit_length() <= _BITS):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth < _DEPTH and isinstance(value, Mapping):
        return {str(_json_able(name, _DEPTH)): _json_able(inner, depth + 1) for name, inner in value.items()}
    if depth < _DEPTH and isinstance(value, list | tuple):
        return [_json_able(inner, depth + 1) for inner in value]
    return _shown(value)


def _shown(value: Any) -> str:
    try:
        return ascii(value)[:_SHOWN]
    except Exception:  # somebody else's __repr__, or too deep for it
        return f"<{type(value).__name__}>"


def _as_given(value: Any) -> Any:
    return value if value is None else _json_able(value if isinstance(value, Mapping) else {"item": value})


def _as_text(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {
        _well_formed(str(name)): None if is_null(value) else _well_formed(str(value))
        for name, value in values.items()
    }


_Text = Annotated[str, BeforeValidator(_well_formed)]


class Row(BaseModel):
    """What became of one request of a batch.

    Attributes:
        row: position of the request in the batch, from 0.
        status: "generated" (paid for in this batch), "cached" (its images were there, also a duplicate's),
            "failed" (with `images` where only the delivery failed) or "skipped" (never sent).
        request: what was asked; None for an illegal item, which only an iterable that is no sequence can bring here: a
            sequence with one is refused as a whole.
        given: an illegal item as it was given, so that its owner finds it again.
        request_hash: the request's name for ever; None for an illegal item.
        images: in the order of the answer.
        delivered: their copies under the names consumers know.
        usage: tokens, where the API counted them; a cached row shows those of its first payment.
        error, error_type: why it failed or was skipped, and the name of the error's class.
        api_calls: how often this batch sent the request; 0 for a cached row.
        seconds: how long this batch worked on the answer; 0 for a cached row.
        created_at: when the answer was recorded.
        api_origin: who answered, e.g. `https://api.ttapi.io`.
        flow_run_id, task_run_id: the Prefect runs that paid, where there were any.
        maybe_paid: notes on payments that may have given no images.
        also_paid: notes on payments whose answer came second, and was not used.
        values: the prompts file's other columns, as text; a null stays one.
        ledger_tag, ledger_size: tag and length in bytes of the ledger record that the row was made from: while a
            listing of the store shows both, the row still says what the record says.
    """

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    row: int = Field(ge=0)
    status: Status
    request_hash: str | None = None
    request: ImageRequest | None = None
    given: Annotated[dict[str, JsonValue] | None, BeforeValidator(_as_given), _OF_ITS_BATCH] = None
    images: tuple[StoredImage, ...] = ()
    delivered: Annotated[tuple[DeliveredImage, ...], _OF_ITS_BATCH] = ()
    usage: Usage | None = None
    error: Annotated[_Text | None, _OF_ITS_BATCH] = None
    error_type: Annotated[str | None, _OF_ITS_BATCH] = None
    api_calls: Annotated[int, _OF_ITS_BATCH] = 0
    seconds: Annotated[float, _OF_ITS_BATCH] = 0.0
    created_at: datetime | None = None
    api_origin: str | None = None
    flow_run_id: str | None = None
    task_run_id: str | None = None
    maybe_paid: tuple[_Text, ...] = ()
    also_paid: tuple[_Text, ...] = ()
    values: Annotated[dict[str, str | None], BeforeValidator(_as_text), _OF_ITS_BATCH] = {}
    ledger_tag: str | None = None
    ledger_size: int | None = Field(default=None, ge=0)

    @classmethod
    def of(cls, row: int, generation: Generation, status: Status = "generated", **others: Any) -> Self:
        """Return the row of an answered request; `others` are fields that a generation does not know."""
        known = {
            name: getattr(generation, name) for name in Generation.model_fields if name in cls.model_fields
        }
        unpaid = CACHED if status == "cached" else {}
        return cls(**{"row": row, "status": status} | known | unpaid | others)

    def again(self, row: int, **others: Any) -> Self:
        """Return the cached row of another request that has the same images, and for which nothing was sent.

        What tells of this row's own batch is reset, unless `others` has it.
        """
        kept = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if _OF_ITS_BATCH not in field.metadata
        }
        return type(self)(**kept | {"row": row, "status": "cached"} | others)

    @property
    def prompt(self) -> str:
        """The prompt, also of an illegal item that has one; else empty."""
        return self.request.prompt if self.request else self._given("prompt")

    @property
    def model(self) -> str:
        """The model asked for, also by an illegal item that names one; else empty."""
        return self.request.model if self.request else self._given("model")

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked besides the prompt: the model and what differs from the defaults; or all that was given."""
        if self.request is None:
            return {name: value for name, value in (self.given or {}).items() if name != "prompt"}
        changed = self.request.model_dump(exclude={"prompt"}, exclude_defaults=True)
        return {"model": self.request.model} | changed

    def copies(self, image: StoredImage) -> tuple[DeliveredImage, ...]:
        """Return the copies of one of its images."""
        return tuple(copy for copy in self.delivered if copy.source_uri == image.uri)

    def line(self) -> bytes:
        """Return the manifest's line, with its line feed.

        >>> Row(row=0, status="skipped").line()[:38]
        b'{"row":0,"status":"skipped","request_h'
        """
        return self.model_dump_json().encode() + b"\n"

    def _given(self, name: str) -> str:
        value = (self.given or {}).get(name)
        return value if isinstance(value, str) else ""


def read_manifest(lines: Iterable[bytes | str]) -> Iterator[Row]:
    """Yield the rows of a manifest's lines, e.g. of an open file; unknown fields are left out.

    Raises:
        ValueError: a line is no row; the message says which, counted from 1.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _row(line, number)


def _row(line: bytes | str, number: int) -> Row:
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(f"line {number} of the manifest is no row: {error}") from None


class Mark(NamedTuple):
    """How many rows, and bytes, had come at some moment."""

    rows: int = 0
    size_bytes: int = 0


class RowFile:
    """Rows in a temporary file, by number; 16 bytes of memory each.

    One thread adds, in any order; any thread reads.

    Args:
        lines: of a manifest, to begin with; blank ones are left out.

    >>> rows = RowFile()
    >>> for number in (2, 0):
    ...     rows.add(Row(row=number, status="skipped"))
    >>> [row.row for row in rows.rows()], rows.mark.rows
    ([0, 2], 2)
    """

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
        self._spool = Spool()
        self._starts = array("q")
        self._sizes = array("q")
        self.mark = Mark()
        for line in filter(bytes.strip, lines):
            self.append(line)

    def __len__(self) -> int:
        return len(self._starts)

    def _line(self, number: int) -> bytes:
        """Return a row's line; it is empty where the row never came."""
        return self._spool.read_at(self._starts[number], self._sizes[number])

    def row(self, number: int) -> Row:
        """Return a row. ValueError: its line is no row."""
        return _row(self._line(number), number + 1)

    def append(self, line: bytes) -> int:
        """Keep a manifest's line as the last row; return its number."""
        number = len(self)
        self._put(number, line)
        return number

    def add(self, row: Row) -> None:
        """Keep a row."""
        self._put(row.row, row.line())

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the rows that came, in the order of the requests."""
        return filter(None, map(self._line, range(len(self))))

    def rows(self) -> Iterator[Row]:
        """Yield the rows that came, in the order of the requests."""
        return read_manifest(self.lines())

    def between(self, one: Mark, other: Mark) -> Spool:
        """Return the lines that came from one mark to the other, as they came."""
        starts = range(one.size_bytes, other.size_bytes, _CHUNK)
        return Spool.of(self._spool.read_at(at, min(_CHUNK, other.size_bytes - at)) for at in starts)

    def _put(self, number: int, line: bytes) -> None:
        missing = [0] * (number + 1 - len(self))
        self._starts.extend(missing)
        self._sizes.extend(missing)
        self._starts[number], self._sizes[number] = self._spool.size_bytes, len(line)
        self._spool.write(line)
        self.mark = Mark(self.mark.rows + 1, self._spool.size_bytes)


class Rows(Sequence[Row]):
    """The rows of a manifest.

    Args:
        file: has all of them, by number.
        selected: the numbers of those that are in the sequence; None: all.

    >>> rows = Rows(RowFile(Row(row=number, status="skipped").line() for number in range(9)))
    >>> len(rows), rows[-1].row, [row.row for row in rows[2:5]]
    (9, 8, [2, 3, 4])
    """

    def __init__(self, file: RowFile, selected: range | None = None) -> None:
        self._file = file
        self._selected = range(len(file)) if selected is None else selected

    def __len__(self) -> int:
        return len(self._selected)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        selected = self._selected[index]
        return self._file.row(selected) if isinstance(selected, int) else Rows(self._file, selected)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<{len(self):,} rows of a manifest>"


def writes_parquet() -> bool:
    """Return whether pyarrow is there, which comes with the extra `parquet`."""
    return find_spec("pyarrow") is not None


def parquet_of(lines: Iterable[bytes]) -> Spool:
    """Return a manifest's lines as a Parquet file, for pandas, DuckDB and their like.

    - `row`, `status`, `error`, `error_type`, `seconds` and the like: as in the manifest; `created_at` is a time stamp.
    - `prompt`, `model`, `n`, `size` and the like: the request's fields, one column each. Of an illegal item, which is
      in `given` as JSON, there are prompt and model if they are text.
    - `images` and `delivered`: lists of structs; `usage`: a struct of `input_tokens`, `output_tokens`, `total_tokens`.
    - `maybe_paid`, `also_paid`: lists of text; `values`: a map from text to text.

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
    usage = pyarrow.struct(dict.fromkeys(TOKENS, pyarrow.int64()).items())
    others = {"given": pyarrow.string(), "usage": usage}
    columns: list[Any] = []
    for name, kind in _fields(pyarrow, Row):
        columns += [*kind] if name == "request" else [(name, others.get(name, kind))]
    return pyarrow.schema(columns)


def _fields(pyarrow: Any, model: type[BaseModel]) -> list[tuple[str, Any]]:
    return [(name, _column(pyarrow, field.annotation)) for name, field in model.model_fields.items()]


def _column(pyarrow: Any, annotation: Any) -> Any:
    """Return the column type of a field; what is none of these is text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, Union, UnionType):
        return _column(pyarrow, arguments[0])
    if origin is tuple:
        return pyarrow.list_(_column(pyarrow, arguments[0]))
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
        "usage": usage and {name: min(usage[name], _LARGEST) for name in TOKENS},
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
