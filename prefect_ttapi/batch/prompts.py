"""Reading a prompts file: every row checked before anything is paid for, all problems told at once."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import BinaryIO, Final

from pydantic import ValidationError

from prefect_ttapi.batch.tables import (
    LARGEST_FILE,
    MOST_COLUMNS,
    MOST_ROWS,
    READERS,
    WITHOUT_LINES,
    Cell,
    Fault,
    Note,
    Row,
    Unfit,
    rows_of,
)
from prefect_ttapi.errors import KeyTemplateError, PromptsError, StoreError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import NAMES, KeyTemplate, plain_name
from prefect_ttapi.storage.layout import bucket_and_prefix, is_s3, normalised, s3_uri
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Names to which key templates give a meaning of their own, whatever a value says.
_TAKEN: Final = frozenset(NAMES) - {"name", "slug"}

#: Control characters but tab and line ends, and what UTF-8 could not decode.
_NO_TEXT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

_UNDECODED: Final = (
    "something that is no text in UTF-8, or in the encoding given: save the file as UTF-8, or name its encoding, "
    "e.g. --encoding windows-1252"
)


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
    """

    requests: list[ImageRequest]
    values: list[dict[str, str | None]]
    columns: tuple[str, ...]
    path: str
    notes: tuple[str, ...] = ()


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
        file = _Reading(wanted, defaults, key, "row" if extension in WITHOUT_LINES else "line")
        file.read(rows_of(data, extension, encoding), limit, skip_blank)
    except PromptsError as error:
        raise PromptsError(f"{name!r} {error}") from None
    for note in file.notes:
        logger.info("%r: %s", name, note)
    for column in file.columns:
        if warning := warning_for(column, meant=column in columns):
            logger.warning("%r: column %r: %s", name, column, warning)
    if file.problems.count:
        raise PromptsError(f"{name!r} can't be used: {file.problems}")
    if not file.requests:
        raise PromptsError(
            f"{name!r} has no rows{' with a prompt' if skip_blank else ''}: it needs one for each request"
        )
    return Prompts(file.requests, file.values, tuple(file.columns), name, tuple(file.notes))


def _wanted(prompt_column: str | None, columns: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the columns that were asked for, by field."""
    for field in columns:
        if field not in ImageRequest.model_fields:
            near = nearest_field(field)
            hint = f"did you mean {near}?" if near else "legal: " + ", ".join(ImageRequest.model_fields)
            raise PromptsError(f"columns: {quoted(field)} is no field of an image request; {hint}")
    if prompt_column and "prompt" in columns:
        raise PromptsError("columns name the one with the prompts, and so does prompt_column: leave out one")
    prompt = prompt_column or columns.get("prompt", "prompt")
    if not prompt:
        raise PromptsError("columns must name one for the prompts")
    return {**columns, "prompt": prompt}


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
        self._plans = lru_cache(256)(lambda names: plan_of(names, wanted, key))
        self._first: Row | None = None
        self._seen: dict[str, None] = {}
        self._misread: dict[str, None] = {}
        self._counted: list[Cell] = []
        self._characters = 0
        self.problems = _Problems(unit)
        self.requests: list[ImageRequest] = []
        self.values: list[dict[str, str | None]] = []
        self.columns: dict[str, None] = {}
        self.notes: dict[str, None] = {}

    def read(self, rows: Iterable[Row | Fault | Note], limit: int | None, skip_blank: bool) -> None:
        """Take the rows, and judge what can be judged of all of them only."""
        number = blank = 0
        for row in rows:
            if isinstance(row, Note):
                self.notes[row.message] = None
                continue
            if skip_blank and isinstance(row, Row) and self._plans(row.names).is_blank(row):
                blank += 1
                continue
            number += 1
            if number > MOST_ROWS or self._is_too_much(row):
                most = f"{MOST_ROWS:,} rows, {MOST_COLUMNS:,} columns and {LARGEST_FILE:,} characters"
                self.problems.add(row.line, [f"is too much: the most is {most}"])
                break
            if isinstance(row, Fault):
                self.problems.add(row.line, [row.message])
            else:
                self._take(row, self._plans(row.names))
            if number == limit:
                break
        if blank:
            self.notes[f"rows without a prompt, passed over: {blank:,}"] = None
        self._judge()

    def _is_too_much(self, row: Row | Fault) -> bool:
        if isinstance(row, Row):
            self._characters += sum(len(cell) for cell in row.cells if isinstance(cell, str))
        return self._characters > LARGEST_FILE or len(self.columns) > MOST_COLUMNS

    def _take(self, row: Row, plan: Plan) -> None:
        self._first = self._first or row
        self._seen |= dict.fromkeys(plan.fields)
        self.columns |= dict.fromkeys(plan.values)
        if plan.problems:
            self.problems.add(row.names_line, plan.problems)
            return
        if "n" in plan.fields:
            self._counted.append(row.cells[plan.fields["n"]])
        if plan.index is not None and row.cells[plan.index]:
            self.notes["the first column has no name: it is taken for row numbers, and left out"] = None
        if faults := list(plan.faults_in(row)):
            self.problems.add(row.line, faults)
            return
        given = plan.fields_of(row)
        try:
            self.requests.append(ImageRequest.model_validate({**self._defaults, **given}))
        except ValidationError as error:
            self.problems.add(row.line, _in_words(error))
            self._misread |= dict.fromkeys(name for name in given if name in self._wrong(given, error))
        self.values.append(plan.values_of(row))

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
                self.problems.add(line, [f"no column is named {quoted(column)}; columns: {_listed(names)}"])
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
        raise PromptsError(f"{name!r} does not exist") from None
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


def _in_words(error: ValidationError) -> list[str]:
    details = error.errors(include_url=False, include_input=False)
    return [f"{detail['loc'][0]} {detail['msg']}" for detail in details]


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
        told = [f"{self._places(lines)}: {message}" for message, lines in self._lines.items()]
        untold = self.count - sum(map(len, self._lines.values()))
        summary = "1 problem" if self.count == 1 else f"{self.count:,} problems"
        rest = [f"and {untold:,} more"] if untold else []
        return "\n  ".join([summary, *told, *rest, *([self.hint] if self.hint else [])])

    def _places(self, lines: list[int]) -> str:
        first = [f"{line}" for line in lines[: self.LINES]]
        if len(lines) == 1:
            return f"{self._unit} {first[0]}"
        if more := len(lines) - len(first):
            return f"{self._unit}s {', '.join(first)} and {more:,} more"
        return f"{self._unit}s {', '.join(first[:-1])} and {first[-1]}"


@dataclass(frozen=True)
class Plan:
    """The meaning of a row's cells, with their positions: fields, values, or neither for want of a name.

    Attributes:
        fields, values: positions by name.
        needed: the values that a key template needs.
        nameless: positions of columns that have no name, but `index`, the first of a table, which has row numbers.
        problems: of the names themselves; with any, the rest must not be used.
    """

    fields: Mapping[str, int]
    values: Mapping[str, int]
    problems: Sequence[str]
    needed: frozenset[str] = frozenset()
    nameless: Sequence[int] = ()
    index: int | None = None

    def fields_of(self, row: Row) -> dict[str, str]:
        """Return the request's fields: the prompt as it stands, others trimmed, without those that are empty."""
        texts = {name: cell for name, at in self.fields.items() if isinstance(cell := row.cells[at], str)}
        return {
            name: text if name == "prompt" else text.strip() for name, text in texts.items() if text.strip()
        }

    def values_of(self, row: Row) -> dict[str, str | None]:
        """Return the other columns' texts, as they stand."""
        cells = ((name, row.cells[at]) for name, at in self.values.items())
        return {name: cell for name, cell in cells if not isinstance(cell, Unfit)}

    def is_blank(self, row: Row) -> bool:
        """Return whether the row has no prompt."""
        return "prompt" in self.fields and _is_blank(row.cells[self.fields["prompt"]])

    def faults_in(self, row: Row) -> Iterator[str]:
        """Return the faults of cells, whatever their column."""
        for name, cell in zip(row.names, row.cells, strict=True):
            if isinstance(cell, str) and (odd := _odd(cell)):
                yield f"{quoted(name)} holds {odd}"
        for at in self.nameless:
            if not _is_blank(row.cells[at]):
                yield (
                    f"has a cell in column {at + 1}, which has no name of letters or digits: give it one; or does "
                    "a cell before it lack its quotation marks?"
                )
        for name, at in self.fields.items():
            if isinstance(cell := row.cells[at], Unfit):
                yield f"{name} holds {cell.what}: text is needed"
        if self.is_blank(row):
            yield "the prompt is blank: fill it in, or pass over such rows with --skip-blank"
        for name in sorted(self.needed & self.values.keys()):
            cell = row.cells[self.values[name]]
            if isinstance(cell, Unfit):
                yield f"{name} holds {cell.what}, of which no key can be made"
            elif _is_blank(cell):
                yield f"{name} is {'null' if cell is None else 'blank'}, and the key template needs it"


def plan_of(names: Sequence[str], wanted: Mapping[str, str | None], key: str | None = None) -> Plan:
    """Return the plan for rows with these names.

    Args:
        wanted: columns by field: `{"prompt": "caption", "size": None}`.
        key: the template that the values are to fill.

    >>> plan_of(("Prompt", " SIZE", "Product ID"), {"prompt": "prompt"}).values
    {'product_id': 2}
    """
    if len(names) > MOST_COLUMNS:
        return Plan({}, {}, [f"has {len(names):,} columns; the most is {MOST_COLUMNS:,}: leave out some"])
    asked = [
        (field, at)
        for field, column in wanted.items()
        if column
        for at, name in enumerate(names)
        if _is(name, column)
    ]
    taken = {at for _, at in asked}
    plain = [(name, at) for at, name in enumerate(map(plain_name, names)) if at not in taken]
    asked += [(name, at) for name, at in plain if name in ImageRequest.model_fields and name not in wanted]
    taken = {at for _, at in asked}
    others = [(name, at) for name, at in plain if name and at not in taken]
    nameless = [at for name, at in plain if not name]
    problems = [f"the name {quoted(name)} holds {odd}" for name in names if (odd := _odd(name))]
    problems += [*_twice(names, asked), *_twice(names, others)]
    if "prompt" not in dict(asked):
        problems.append(
            f"no column is named {quoted(wanted['prompt'] or '')}; columns: {_listed(names)}. Name the one that holds "
            "the prompts: --prompt-column, or prompt_column="
        )
    index = 0 if nameless[:1] == [0] else None
    return Plan(
        dict(asked),
        dict(others),
        problems,
        _needed(key, [name for name, _ in others]),
        [at for at in nameless if at != index],
        index,
    )


def _needed(key: str | None, names: Sequence[str]) -> frozenset[str]:
    try:
        return KeyTemplate(key, names).needed if key else frozenset()
    except KeyTemplateError:
        return frozenset()  # told with the batch's other problems


def nearest_field(name: str) -> str | None:
    """Return the request field that `name` may be a misspelling of.

    >>> nearest_field("modle"), nearest_field("sku")
    ('model', None)
    """
    return next(iter(difflib.get_close_matches(name[:40], ImageRequest.model_fields, n=1, cutoff=0.75)), None)


def warning_for(name: str, *, meant: bool = False) -> str | None:
    """Return the oddity of a value's name that is no error, or None; it is `meant` if its field was given another."""
    if name in _TAKEN:
        return (
            f"{{{name}}} in a key template is not this column: give the column another name to use it there"
        )
    field = None if meant else nearest_field(name)
    return f"it is a value for the key template; did you mean {field}?" if field else None


def quoted(text: str) -> str:
    """Return `text` in quotation marks on one line, cut where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _is(name: str, wanted: str) -> bool:
    plain = plain_name(wanted)
    return name.strip() == wanted.strip() or bool(plain and plain_name(name) == plain)


def _is_blank(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names[:20])) or "none"


def _twice(names: Sequence[str], group: Sequence[tuple[str, int]]) -> Iterator[str]:
    first: dict[str, int] = {}
    for name, at in group:
        if first.setdefault(name, at) != at:
            yield f"columns {quoted(names[first[name]])} and {quoted(names[at])} are both {name}: rename one of them"


def _odd(text: str) -> str | None:
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    if "\udc80" <= found[0] <= "\udcff":
        return _UNDECODED
    if found[0] >= "\ud800":
        return "a lone surrogate, which is no character"
    wide = "; if the file is UTF-16: --encoding utf-16" if found[0] == "\0" else ""
    return f"the control character U+{ord(found[0]):04X}{wide}"
