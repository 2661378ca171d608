"""Rows of text from CSV, TSV and JSON Lines, each with the line that it starts on."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NoReturn

#: Characters. It bounds the memory that one line can take.
LONGEST_LINE: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the texts under their columns' names, both as they stand in the file.

    `line` is where the row starts, `names_line` where its names stand; lines count from 1.
    """

    line: int
    texts: tuple[str, ...]
    names: tuple[str, ...]
    names_line: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that can't be used, or the line after which nothing more could be read."""

    line: int
    message: str


def rows_of(data: bytes, extension: str) -> Iterator[Row | Fault]:
    r"""Return the rows of a file's bytes, UTF-8 with or without a byte-order mark. Empty rows are left out.

    - `.csv`: commas, and quotation marks around cells that hold commas, line ends or quotation marks, these
      written twice (RFC 4180). Where the first line has semicolons and no comma, semicolons separate.
    - `.tsv`, `.tab`: a cell is what stands between two tabs. There is no quoting: quotation marks are text.
    - `.jsonl`, `.ndjson`: an object in each line. Numbers stay as they are written, `null` is an empty text;
      lists and objects inside are faults.

    >>> [row.texts for row in rows_of(b'prompt,n\n"a ""red"" cat",2\n', ".csv")]
    [('a "red" cat', '2')]
    >>> list(rows_of(b'{"prompt": "a cat", "n": 2}\n[]\n', ".jsonl"))[1]
    Fault(line=2, message='is no JSON object')
    """
    try:
        yield from READERS[extension](_lines(data))
    except _UnreadableError as error:
        yield Fault(error.line, f"{error}; nothing after it was read")


class _UnreadableError(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _lines(data: bytes) -> Iterator[str]:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _UnreadableError(1, "is UTF-16: save the file as UTF-8")
    # bytes that are not UTF-8 come through as lone surrogates: whoever takes a cell sees them, with its line
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", errors="surrogateescape", newline="")
    number = 0
    while line := text.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise _UnreadableError(number, f"is longer than {LONGEST_LINE:,} characters")
        yield line


Record = tuple[int, list[str]] | Fault


def _csv(lines: Iterator[str]) -> Iterator[Row | Fault]:
    first = next(lines, "")
    separator = ";" if ";" in first and "," not in first else ","
    return _under_a_header(_csv_records(csv.reader(chain([first], lines), delimiter=separator, strict=True)))


def _csv_records(reader: Any) -> Iterator[Record]:
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            words = str(error)
            yield Fault(line, next((ours for theirs, ours in _CSV_FAULTS.items() if theirs in words), words))
            continue
        if cells:
            yield line, cells


#: The csv module's words, and what they mean to who wrote the file.
_CSV_FAULTS: Final[Mapping[str, str]] = {
    "expected after": "a cell goes on after its closing quotation mark; inside a cell, write it twice",
    "unexpected end": "a quotation mark is opened and never closed",
    "field limit": "a cell is too long; is a quotation mark opened and never closed?",
}


def _tsv(lines: Iterator[str]) -> Iterator[Row | Fault]:
    bare = ((number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1))
    return _under_a_header((number, line.split("\t")) for number, line in bare if line)


def _under_a_header(records: Iterator[Record]) -> Iterator[Row | Fault]:
    header = next(records, None)
    if header is None or isinstance(header, Fault):
        yield from () if header is None else (header,)
        return
    names_line, names = header[0], tuple(header[1])
    for record in records:
        if isinstance(record, Fault):
            yield record
            continue
        line, cells = record
        if len(names) > 1 and not any(map(str.strip, cells)):
            continue  # a spreadsheet's empty row
        if len(cells) == len(names):
            yield Row(line, tuple(cells), names, names_line)
        else:
            yield Fault(line, f"its number of cells is {len(cells)}, the header's is {len(names)}")


def _jsonl(lines: Iterator[str]) -> Iterator[Row | Fault]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _from_json(number, line)


def _from_json(number: int, line: str) -> Row | Fault:
    try:
        # objects become tuples of pairs, so that a name that occurs twice is seen
        pairs = json.loads(
            line, object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=_refuse
        )
    except json.JSONDecodeError as error:
        return Fault(number, f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Fault(number, f"is not JSON: {error}")
    if not isinstance(pairs, tuple):
        return Fault(number, "is no JSON object")
    nested = [name for name, value in pairs if isinstance(value, list | tuple)]
    if nested:
        return Fault(
            number, f"{nested[0][:60]!r} holds a list or an object; only text, numbers, true, false, null"
        )
    texts = (value if isinstance(value, str) else _JSON_WORDS[value] for _, value in pairs)
    return Row(number, tuple(texts), tuple(name for name, _ in pairs), number)


_JSON_WORDS: Final[Mapping[bool | None, str]] = {None: "", True: "true", False: "false"}


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no value")


#: What reads a file, by its extension.
READERS: Final[Mapping[str, Callable[[Iterator[str]], Iterator[Row | Fault]]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".tab": _tsv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}
