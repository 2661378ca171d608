"""Reading a prompts file: every row checked before anything is paid for, all problems told at once."""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import BinaryIO, Final

from pydantic import ValidationError

from prefect_ttapi.cli.tables import READERS, Fault, Row, rows_of
from prefect_ttapi.errors import PromptsError, StoreError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import NAMES
from prefect_ttapi.storage.layout import bucket_and_prefix, is_s3, normalised, s3_uri
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Bytes, rows and columns: they bound the memory that a file can take.
LARGEST_FILE: Final = 256 * 1024 * 1024
MOST_ROWS: Final = 250_000
MOST_COLUMNS: Final = 1_000

#: Names to which key templates give a meaning of their own, whatever a value says.
_TAKEN: Final = frozenset(NAMES) - {"name", "slug"}

#: Control characters but tab and line ends, and what UTF-8 could not decode.
_NO_TEXT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Prompts:
    """The requests of a prompts file, and the other columns.

    Attributes:
        requests: one for each row, in the file's order.
        values: for each row, the texts of the columns that are no request fields, for the key template.
        columns: the names in `values`, in the file's order.
        path: the file, as it was given.
    """

    requests: list[ImageRequest]
    values: list[dict[str, str]]
    columns: tuple[str, ...]
    path: str


def read_prompts(
    path: str | os.PathLike[str],
    *,
    prompt_column: str | None = None,
    defaults: Mapping[str, object] = MappingProxyType({}),
    limit: int | None = None,
) -> Prompts:
    """Read and check a prompts file in UTF-8: `.csv`, `.tsv`, `.tab`, `.jsonl` or `.ndjson`.

    A column that is named like a field of `ImageRequest` is that field; any other is a value for the key
    template. Names are compared and used in lower case, with `_` for what is neither letter nor digit:
    `Product ID` is `product_id`. `prefect_ttapi.cli.tables.rows_of` says more of the formats; a TSV file
    has no quoting.

    An empty cell means "not given". A row's own cell wins over `defaults`; what neither gives has the
    vendor's default. Prompts and values are taken as they stand, other fields without the blanks around them.

    Args:
        path: a local file, `file:///...`, or `s3://bucket/key` with credentials as AWS's tools find them.
        prompt_column: the column that holds the prompts, where it is not called `prompt`.
        defaults: values for fields of every row; None counts as not given.
        limit: take the first rows only; what follows them is not checked.

    Raises:
        PromptsError: all that is wrong with the file, or why it can't be read.
    """
    name = os.fspath(path)
    if limit is not None and limit < 1:
        raise PromptsError(f"limit must be at least 1, not {limit}")
    extension, data = _read(name)
    given = {field: value for field, value in defaults.items() if value is not None}
    plans = lru_cache(256)(lambda names: plan_of(names, prompt_column))
    problems = _Problems()
    requests: list[ImageRequest] = []
    values: list[dict[str, str]] = []
    columns: dict[str, None] = {}
    for number, row in enumerate(islice(rows_of(data, extension), limit), 1):
        if number > MOST_ROWS or len(columns) > MOST_COLUMNS:
            problems.add(
                row.line, [f"is too much: the most is {MOST_ROWS:,} rows and {MOST_COLUMNS:,} columns"]
            )
            break
        if isinstance(row, Fault):
            problems.add(row.line, [row.message])
            continue
        plan = plans(row.names)
        columns |= dict.fromkeys(plan.values.values())
        if plan.problems:
            problems.add(row.names_line, plan.problems)
            continue
        problems.add(row.line, plan.faults_in(row))
        try:
            requests.append(ImageRequest.model_validate(given | plan.fields_of(row)))
        except ValidationError as error:
            problems.add(row.line, _in_words(error))
        values.append(plan.values_of(row))
    _warn(name, columns)
    if problems.count:
        raise PromptsError(f"{name!r} can't be used: {problems}")
    if not requests:
        raise PromptsError(f"{name!r} has no rows: it needs one for each request")
    return Prompts(requests, values, tuple(columns), name)


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
            raise PromptsError(f"{name!r} must end in one of {', '.join(READERS)}")
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


def _warn(path: str, columns: Iterable[str]) -> None:
    for name in columns:
        warning = warning_for(name)
        if warning:
            logger.warning("%r: column %r: %s", path, name, warning)


class _Problems:
    """Problems with the lines they are on; the same one on many lines is told once."""

    SHOWN = 20
    LINES = 10

    def __init__(self) -> None:
        self.count = 0
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
        return "\n  ".join([summary, *told, *([f"and {untold:,} more"] if untold else [])])

    def _places(self, lines: list[int]) -> str:
        first = [f"{line}" for line in lines[: self.LINES]]
        if len(lines) == 1:
            return f"line {first[0]}"
        if more := len(lines) - len(first):
            return f"lines {', '.join(first)} and {more:,} more"
        return f"lines {', '.join(first[:-1])} and {first[-1]}"


@dataclass(frozen=True)
class Plan:
    """The meaning of a row's cells, by their position: fields, values, or neither for want of a name.

    `problems` are those of the names themselves; with any, the rest must not be used.
    """

    fields: Mapping[int, str]
    values: Mapping[int, str]
    nameless: Sequence[int]
    problems: Sequence[str]

    def fields_of(self, row: Row) -> dict[str, str]:
        """Return the request's fields: the prompt as it stands, others trimmed, without those that are empty."""
        cells = {name: row.texts[at] for at, name in self.fields.items()}
        trimmed = {name: text.strip() for name, text in cells.items() if name != "prompt"}
        return {"prompt": cells["prompt"]} | {name: text for name, text in trimmed.items() if text}

    def values_of(self, row: Row) -> dict[str, str]:
        """Return the other columns' texts, as they stand."""
        return {name: row.texts[at] for at, name in self.values.items()}

    def faults_in(self, row: Row) -> Iterator[str]:
        """Return the faults of cells, whatever their column."""
        for name, text in zip(row.names, row.texts, strict=True):
            if odd := _odd(text):
                yield f"{quoted(name)} holds {odd}"
        for at in self.nameless:
            if row.texts[at].strip():
                yield f"has a cell in column {at + 1}, which has no name of letters or digits"


def plan_of(names: Sequence[str], prompt_column: str | None) -> Plan:
    """Return the plan for rows with these names.

    >>> plan_of(("Prompt", " SIZE", "Product ID"), None).values
    {2: 'product_id'}
    """
    if len(names) > MOST_COLUMNS:
        return Plan({}, {}, (), [f"has {len(names):,} columns; the most is {MOST_COLUMNS:,}"])
    wanted = prompt_column or "prompt"
    prompts = [at for at, name in enumerate(names) if _is(name, wanted)]
    plain = {at: plain_name(name) for at, name in enumerate(names) if at not in prompts}
    fields = {
        at: name for at, name in plain.items() if name in ImageRequest.model_fields and name != "prompt"
    }
    fields |= dict.fromkeys(prompts, "prompt")
    values = {at: name for at, name in plain.items() if name and at not in fields}
    problems = [f"the name {quoted(name)} holds {odd}" for name in names if (odd := _odd(name))]
    problems += [*_twice(names, fields), *_twice(names, values)]
    if not prompts:
        known = ", ".join(map(quoted, names[:20])) or "none"
        problems.append(
            f"no column is named {quoted(wanted)}; columns: {known}. Name the one that holds the prompts: "
            "--prompt-column, or prompt_column="
        )
    return Plan(fields, values, [at for at, name in plain.items() if not name], problems)


def plain_name(name: str) -> str:
    """Return a column's name as key templates use it: an identifier, or empty where none can be made.

    >>> plain_name(" Product-ID (new)"), plain_name("Größe"), plain_name("2nd line"), plain_name("#")
    ('product_id_new', 'größe', '_2nd_line', '')
    """
    lower = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).lower())
    signs = "".join(sign if f"_{sign}".isidentifier() else "_" for sign in lower)
    plain = re.sub("_+", "_", signs).strip("_")
    return plain if not plain or plain.isidentifier() else f"_{plain}"


def nearest_field(name: str) -> str | None:
    """Return the request field that `name` may be a misspelling of.

    >>> nearest_field("modle"), nearest_field("sku")
    ('model', None)
    """
    return next(iter(difflib.get_close_matches(name[:40], ImageRequest.model_fields, n=1, cutoff=0.75)), None)


def warning_for(name: str) -> str | None:
    """Return the oddity of a value's name that is no error, or None."""
    if name in _TAKEN:
        return (
            f"{{{name}}} in a key template is not this column: give the column another name to use it there"
        )
    field = nearest_field(name)
    return f"it is a value for the key template; did you mean {field}?" if field else None


def quoted(text: str) -> str:
    """Return `text` in quotation marks on one line, cut where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _is(name: str, wanted: str) -> bool:
    plain = plain_name(wanted)
    return name.strip() == wanted.strip() or bool(plain and plain_name(name) == plain)


def _twice(names: Sequence[str], group: Mapping[int, str]) -> Iterator[str]:
    first: dict[str, int] = {}
    for at, name in group.items():
        if first.setdefault(name, at) != at:
            yield f"columns {quoted(names[first[name]])} and {quoted(names[at])} are both {name}"


def _odd(text: str) -> str | None:
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    if found[0] >= "\ud800":
        return "something that is not UTF-8 text: save the file as UTF-8"
    return f"the control character U+{ord(found[0]):04X}"
