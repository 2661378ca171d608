"""Read a prompts file: check every row before anything is paid for, and tell all problems at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import BinaryIO, Final

from pydantic import ValidationError

from prefect_ttapi.batch import tables, workbooks
from prefect_ttapi.batch.columns import Columns, columns_of, listed, quoted, warning_for
from prefect_ttapi.batch.tables import (
    LARGEST_FILE,
    MOST_COLUMNS,
    MOST_ROWS,
    Cell,
    Fault,
    Read,
    Row,
    Source,
    UnreadableError,
)
from prefect_ttapi.capabilities import nearest, problems_of
from prefect_ttapi.errors import PromptsError, StoreError
from prefect_ttapi.lineage.shown import places
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import plain_name
from prefect_ttapi.storage.layout import bucket_and_prefix, is_s3, normalised, s3_uri
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: What reads a file, by its extension.
READERS: Final = {**tables.READERS, **workbooks.READERS}


@dataclass(frozen=True)
class Prompts:
    """The requests of a prompts file, and the other columns.

    Attributes:
        requests: one for each row, in the file's order.
        values: for each row, the texts of the columns that are no request fields, for the key template; None is a
            null. What is no text (lists and objects in JSON, say) is left out.
        columns: the names in `values`, in the file's order.
        path: the file, as it was given.
        notes: how the file was taken where it could have been taken otherwise, and what was passed over.
        lines: for each row, the line of the file that it starts on, from 1; of a workbook, the row.
    """

    requests: list[ImageRequest]
    values: list[dict[str, str | None]]
    columns: tuple[str, ...]
    path: str
    notes: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()


def read_prompts(
    path: str | os.PathLike[str],
    *,
    prompt_column: str | None = None,
    columns: Mapping[str, str | None] = MappingProxyType({}),
    defaults: Mapping[str, object] = MappingProxyType({}),
    limit: int | None = None,
    encoding: str | None = None,
    skip_blank: bool = False,
    key: str | None = None,
) -> Prompts:
    """Read and check a prompts file: CSV, TSV, plain text, JSON, JSON Lines, OpenAI's Batch API, Excel or Parquet.

    A column that is named like a field of `ImageRequest` is that field; any other is a value for the key
    template. Names are compared and used in lower case, with `_` for what is neither letter nor digit:
    `Product ID` is `product_id`. `docs/prompts.md` says more of the kinds of files.

    An empty cell means "not given". A row's own cell wins over `defaults`; what neither gives has the
    vendor's default. Prompts and values are taken as they stand, other fields without the blanks around them.

    Args:
        path: a local file, `file:///...`, or `s3://bucket/key` with credentials as AWS's tools find them.
        prompt_column: the column that holds the prompts, where it is not called `prompt`.
        columns: for a request's field the column that holds it; None: none does, and the column of its name is a
            value like any other.
        defaults: values for fields of every row; None counts as not given.
        limit: take the first rows only; what follows them is not checked.
        encoding: of text that is not UTF-8, e.g. `windows-1252`; UTF-16 with a byte-order mark needs none.
        skip_blank: pass over rows whose prompt is blank; else they are errors.
        key: a key template: a row whose cells can't fill it is an error.

    Raises:
        PromptsError: all that is wrong with the file, or why it can't be read.
    """
    name = os.fspath(path)
    if limit is not None and limit < 1:
        raise PromptsError(f"limit must be at least 1, not {limit}")
    wanted = _wanted(prompt_column, columns)
    extension, data = _read(name)
    try:
        file = _Reading(wanted, defaults, key, "row" if extension in workbooks.READERS else "line")
        file.read(rows_of(data, extension, encoding), limit, skip_blank)
    except PromptsError as error:
        raise PromptsError(f"{name!r} {error}") from None
    for note in file.notes:
        logger.info("%r: %s", name, note)
    for column in file.columns:
        if warning := warning_for(column, meant=plain_name(column) in columns):
            logger.warning("%r: column %r: %s", name, column, warning)
    if file.problems.count:
        raise PromptsError(f"{name!r} can't be used: {file.problems}")
    if not file.requests:
        raise PromptsError(
            f"{name!r} has no rows{' with a prompt' if skip_blank else ''}: it needs one for each request"
        )
    return Prompts(
        file.requests, file.values, tuple(file.columns), name, tuple(file.notes), tuple(file.lines)
    )


def _wanted(prompt_column: str | None, columns: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the columns that were asked for, by field."""
    for field in columns:
        if field not in ImageRequest.model_fields:
            hint = nearest(field, ImageRequest.model_fields)
            raise PromptsError(f"columns: {quoted(field)} is no field of an image request; {hint}")
    if prompt_column and "prompt" in columns:
        raise PromptsError("columns name the one with the prompts, and so does prompt_column: leave out one")
    prompt = prompt_column or columns.get("prompt", "prompt")
    if not prompt:
        raise PromptsError("columns must name one for the prompts")
    return {**columns, "prompt": prompt}


def rows_of(data: bytes, extension: str, encoding: str | None = None) -> Read:
    r"""Return the rows of a file's bytes; `docs/prompts.md` tells of every kind. Empty rows are left out.

    Args:
        encoding: of text; by default UTF-8, or what a byte-order mark says.

    >>> [row.cells for row in rows_of(b'prompt,n\n"a ""red"" cat",2\n', ".csv")]
    [('a "red" cat', '2')]
    >>> list(rows_of(b'{"prompt": "a cat", "n": 2}\n[]\n', ".jsonl"))[1]
    Fault(line=2, message='is neither a JSON object nor a text')

    Raises:
        PromptsError: what reads such files is not installed.
    """
    try:
        yield from READERS[extension](Source(data, encoding))
    except UnreadableError as error:
        yield Fault(error.line, f"{error}; nothing after it was read")


class _Reading:
    """Requests and values as they are read, and the problems on the way.

    Args:
        wanted: the columns asked for, by field.
        defaults: of fields, for all rows.
        key: the template that values are to fill.
        unit: what rows are counted by in messages.
    """

    def __init__(
        self, wanted: Mapping[str, str | None], defaults: Mapping[str, object], key: str | None, unit: str
    ) -> None:
        self._wanted = wanted
        self._defaults = {field: value for field, value in defaults.items() if value is not None}
        self._columns_of = lru_cache(256)(lambda names: columns_of(names, wanted, key))
        self._first: Row | None = None
        self._seen: dict[str, None] = {}
        self._misread: dict[str, None] = {}
        self._counted: list[Cell] = []
        self._characters = 0
        self.problems = _Problems(unit)
        self.requests: list[ImageRequest] = []
        self.values: list[dict[str, str | None]] = []
        self.lines: list[int] = []
        self.columns: dict[str, None] = {}
        self.notes: dict[str, None] = {}

    def read(self, rows: Read, limit: int | None, skip_blank: bool) -> None:
        """Take the rows, and judge what can be judged of all of them only."""
        number = blank = 0
        for row in rows:
            if isinstance(row, str):
                self.notes[row] = None
                continue
            if isinstance(row, Row):
                columns = self._columns_of(row.names)
                self._counted += [row.cells[columns.fields["n"]]] if "n" in columns.fields else []
                if skip_blank and columns.is_blank(row):
                    blank += 1
                    continue
            number += 1
            if number > MOST_ROWS or self._is_too_much(row):
                most = f"{MOST_ROWS:,} rows, {MOST_COLUMNS:,} columns and {LARGEST_FILE:,} characters"
                self.problems.add(row.line, [f"is too much: the most is {most}"])
                break
            if isinstance(row, Row):
                self._take(row, columns)
            else:
                self.problems.add(row.line, [row.message])
            if number == limit:
                break
        if blank:
            self.notes[f"rows without a prompt, passed over: {blank:,}"] = None
        self._judge()

    def _is_too_much(self, row: Row | Fault) -> bool:
        if isinstance(row, Row):
            self._characters += sum(len(cell) for cell in row.cells if isinstance(cell, str))
        return self._characters > LARGEST_FILE or len(self.columns) > MOST_COLUMNS

    def _take(self, row: Row, columns: Columns) -> None:
        self._first = self._first or row
        self._seen |= dict.fromkeys(columns.fields)
        self.columns |= dict.fromkeys(columns.values)
        if columns.problems:
            self.problems.add(row.names_line, columns.problems)
            return
        if columns.index is not None and row.cells[columns.index]:
            self.notes["the first column has no name: it is taken for row numbers, and left out"] = None
        if faults := list(columns.faults_in(row)):
            self.problems.add(row.line, faults)
            return
        given = columns.fields_of(row)
        try:
            self.requests.append(ImageRequest.model_validate({**self._defaults, **given}))
        except ValidationError as error:
            self.problems.add(row.line, problems_of(error))
            wrong = self._wrong(given, error)
            self._misread |= dict.fromkeys(name for name in given if name in wrong)
        self.values.append(columns.values_of(row))
        self.lines.append(row.line)

    def _wrong(self, given: Mapping[str, str], error: ValidationError) -> set[str]:
        """Return the fields that are illegal and were not asked for: perhaps their columns mean something else."""
        wrong = {str(detail["loc"][0]) for detail in error.errors(include_url=False)} - self._wanted.keys()
        if "model" in wrong:  # without a model nothing else was judged
            try:
                ImageRequest.model_validate({**self._defaults, **given, "model": "gpt-image-1"})
            except ValidationError as more:
                return wrong | self._wrong({**given, "model": "gpt-image-1"}, more)
        return wrong

    def _judge(self) -> None:
        """Add the problems that show in all rows together."""
        if self._first is None:
            return
        line, names = self._first.names_line, self._first.names
        for field, column in self._wanted.items():
            if column and field not in self._seen and field != "prompt":
                self.problems.add(line, [f"no column is named {quoted(column)}; columns: {listed(names)}"])
        if "n" not in self._wanted and _counts_up(self._counted):
            self.problems.add(line, [_COUNTS_UP])
        if self._misread:
            options = ",".join(f"{field}=" for field in self._misread)
            self.problems.hint = (
                f"where a column means something else than the field of its name: --columns {options} "
                "makes it a value for the key template, and size=image_size takes another column"
            )


_COUNTS_UP: Final = (
    "column 'n' counts up: is it the number of the row? --columns n= makes it a value; --columns n=n pays for 1 image, "
    "then 2, then 3, and so on"
)


def _counts_up(cells: Sequence[Cell]) -> bool:
    try:
        numbers = [int(float(cell)) for cell in cells if isinstance(cell, str)]
    except (ValueError, OverflowError):
        return False
    return len(numbers) > 2 and numbers == [*range(numbers[0], numbers[0] + len(cells))]


def _read(name: str) -> tuple[str, bytes]:
    """Return the file's extension and bytes."""
    try:
        address = normalised(name)
    except ValueError:
        # not shown: an address that is none of ours may be a signed one
        raise PromptsError("prompts are read from a local file, file:///... or s3://bucket/key") from None
    extension = PurePosixPath(address).suffix.lower()
    try:
        if not is_s3(address) and Path(address).is_dir():
            raise PromptsError(f"{name!r} is a folder, not a file")
        if extension not in READERS:
            raise PromptsError(
                f"{name!r} must end in one of {', '.join(READERS)}: save anything else as one of these"
            )
        with _open(address) as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        # a run of a deployment works in another folder than whoever wrote the path
        where = "" if address == name or "://" in name else f" in {Path.cwd()}"
        raise PromptsError(f"{name!r} does not exist{where}") from None
    except OSError as error:
        raise PromptsError(f"{name!r} can't be read: {error.strerror or error}") from error
    except StoreError as error:
        raise PromptsError(str(error)) from error
    if len(data) > LARGEST_FILE:
        raise PromptsError(f"{name!r} is larger than {LARGEST_FILE // 1024**2} MiB")
    if not data.strip(b"\xef\xbb\xbf\r\n\t "):
        raise PromptsError(f"{name!r} is empty")
    return extension, data


def _open(address: str) -> BinaryIO:
    if not is_s3(address):
        return Path(address).open("rb")
    bucket, _ = bucket_and_prefix(address)
    store = ImageStore(url=s3_uri(bucket))
    size = store.size(address)
    if size is None:
        raise FileNotFoundError
    if size > LARGEST_FILE:
        raise OSError(f"it is larger than {LARGEST_FILE // 1024**2} MiB")
    return store.open(address)


class _Problems:
    """Problems with the lines they are on; the same one on many lines is told once.

    `hint` is told at the end.
    """

    SHOWN = 20
    LINES = 10

    def __init__(self, unit: str) -> None:
        self.count = 0
        self._unit = unit
        self.hint = ""
        self._lines: dict[str, list[int]] = {}

    def add(self, line: int, messages: Iterable[str]) -> None:
        for message in messages:
            full = message not in self._lines and len(self._lines) == self.SHOWN
            lines = [] if full else self._lines.setdefault(message, [])
            if lines[-1:] != [line]:  # a header's problem comes with each of its rows
                lines.append(line)
                self.count += 1

    def __str__(self) -> str:
        told = [
            f"{places(self._unit, lines, self.LINES)}: {message}" for message, lines in self._lines.items()
        ]
        untold = self.count - sum(map(len, self._lines.values()))
        summary = "1 problem" if self.count == 1 else f"{self.count:,} problems"
        rest = [f"and {untold:,} more"] if untold else []
        return "\n  ".join([summary, *told, *rest, *([self.hint] if self.hint else [])])
