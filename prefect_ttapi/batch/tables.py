"""Rows of cells from files of text: CSV, TSV, JSON, JSON Lines, plain text; each with the line that it starts on."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final, NoReturn

from prefect_ttapi.errors import PromptsError
from prefect_ttapi.storage.keys import plain_name

#: Bytes, also when unpacked; rows, columns, and characters of a line, a JSON item or a cell: they bound the memory.
LARGEST_FILE: Final = 256 * 1024 * 1024
MOST_ROWS: Final = 250_000
MOST_COLUMNS: Final = 1_000
LONGEST_LINE: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Unfit:
    """The content of a cell that is no text, which does no harm in a column that nobody uses."""

    what: str


Cell = str | Unfit | None


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the cells under their columns' names, as they stand in the file; None is a null.

    `line` is where the row starts, `names_line` where its names stand; lines count from 1.
    """

    line: int
    cells: tuple[Cell, ...]
    names: tuple[str, ...]
    names_line: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that can't be used, or the line after which nothing more could be read."""

    line: int
    message: str


#: What is read of a file; a text says how it was taken, where it could have been taken otherwise.
Read = Iterator[Row | Fault | str]


class UnreadableError(Exception):
    """Nothing after this line can be read."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


#: How files begin that are no text, and what to do with them.
_NO_TEXT: Final[Mapping[bytes, str]] = {
    b"PK\x03\x04": "is a workbook or another ZIP file: call it .xlsx if it is one, or save it as CSV",
    b"PAR1": "is Parquet: call it .parquet",
    b"\xd0\xcf\x11\xe0": "is an old Excel file: save it as .xlsx or CSV",
    b"\x1f\x8b": "is compressed: unpack it",
}

#: UTF-32's marks begin like UTF-16's.
_MARKS: Final[Mapping[bytes, str]] = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Source:
    """The bytes of a file, and its text, where lone surrogates stand for bytes that can't be decoded."""

    data: bytes
    encoding: str | None = None

    def lines(self) -> Iterator[str]:
        """Yield the lines with their ends."""
        number = 0
        with self._text() as text:
            try:
                while line := text.readline(LONGEST_LINE + 1):
                    number += 1
                    if len(line) > LONGEST_LINE:
                        raise UnreadableError(number, f"is longer than {LONGEST_LINE:,} characters")
                    yield line.removeprefix("\ufeff") if number == 1 else line
            except UnicodeError as error:
                raise self._wrong(number + 1) from error

    def whole(self) -> str:
        """Return all of the text."""
        with self._text() as text:
            try:
                return text.read().removeprefix("\ufeff")
            except UnicodeError as error:
                raise self._wrong(1) from error

    def _text(self) -> io.TextIOWrapper:
        for start, problem in _NO_TEXT.items():
            if self.data.startswith(start):
                raise UnreadableError(1, problem)
        marked = next((name for mark, name in _MARKS.items() if self.data.startswith(mark)), "utf-8")
        try:
            return io.TextIOWrapper(
                io.BytesIO(self.data), self.encoding or marked, errors="surrogateescape", newline=""
            )
        except (LookupError, ValueError):
            raise PromptsError(
                f"can't be read with the encoding {self.encoding!r}: there is none of that name; "
                "legal are windows-1252, utf-16, mac_roman, shift_jis and what else Python knows"
            ) from None

    def _wrong(self, line: int) -> UnreadableError:
        return UnreadableError(
            line, f"is not text in {self.encoding or 'UTF-16 or UTF-32, as its mark says'}"
        )


def _txt(source: Source) -> Read:
    for number, line in enumerate(source.lines(), 1):
        if line.strip():
            yield Row(number, (line.rstrip("\r\n"),), ("prompt",), number)


Record = tuple[int, list[str]] | Fault

#: The line before the header in which a file tells Excel what separates its cells.
_SEP: Final = re.compile(r'"?sep=([^\r\n])"?\1*[\r\n]*', re.IGNORECASE)
_QUOTED: Final = re.compile(r'"[^"]*("|$)')


def _csv(source: Source) -> Read:
    lines = source.lines()
    first = next(lines, "")
    told = _SEP.fullmatch(first)
    if told:
        yield from _separated(lines, told[1], 2)
        return
    bare = _QUOTED.sub("", first)
    separator = max(",;\t|", key=bare.count)
    if separator == "\t":
        yield from _tsv(source)
    else:
        yield from _separated(chain([first], lines), separator)


def _separated(lines: Iterable[str], separator: str, first: int = 1) -> Read:
    """Return the rows of CSV whose first line has this number."""
    try:
        reader = csv.reader(lines, delimiter=separator, strict=True)
    except (TypeError, ValueError):
        raise UnreadableError(1, f"names {separator!r} as what separates cells, which can't be") from None
    if separator not in (",", "\t"):
        yield f"cells are separated by {separator!r}"
    yield from _under_a_header(_csv_records(reader, first), _OTHER_CELLS[separator == "\t"])


def _csv_records(reader: Any, first: int) -> Iterator[Record]:
    while True:
        line = reader.line_num + first
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

#: What to do about a row with more or fewer cells than the header, by whether tabs separate.
_OTHER_CELLS: Final = (
    "quotation marks belong around a cell that holds what separates cells; in a file called .txt each line is a prompt",
    "a cell may hold a tab, or the row lack one",
)

#: A cell and what ends it, in a file whose marks are a spreadsheet's: in a bare cell there is none.
_CELL: Final = re.compile(r'(?:"([^"]*+(?:""[^"]*+)*+)"|[^"\t\r\n]*+)(\t|\r\n|\r|\n|\Z)')
_NEED_MARKS: Final = frozenset('"\t\r\n,')
#: A cell that only a spreadsheet, or what writes like one, puts into a line.
_DOUBLED: Final = re.compile(r'(?:^|(?<=\t))"[^"\t\r\n]*+(?:""[^"\t\r\n]*+)++"(?=[\t\r\n]|\Z)', re.MULTILINE)


def _tsv(source: Source) -> Read:
    """Return the rows of a file with tabs, whose quotation marks are a spreadsheet's if all can be, else text."""
    kept: list[str] = []
    with suppress(UnreadableError):  # told where the rows are read
        kept.extend(source.lines())
    text = "".join(kept)
    written = _written_by_a_spreadsheet(text) if '"' in text else None
    if written:
        yield "quotation marks around cells are a spreadsheet's, and no part of the text"
        yield from _separated(source.lines(), "\t")
        return
    if written is not None:
        yield "quotation marks are text: they are not as a spreadsheet writes them"
    bare = ((number, line.rstrip("\r\n")) for number, line in enumerate(source.lines(), 1))
    yield from _under_a_header(
        ((number, line.split("\t")) for number, line in bare if line), _OTHER_CELLS[True]
    )


def _written_by_a_spreadsheet(text: str) -> bool:
    """Return whether cells have quotation marks for the reasons of Excel and pandas.

    They quote a cell for a tab, a line end, a mark (doubled then), and Excel for a comma; some quote all of them.
    """
    at, needed = 0, False
    while at < len(text) and (cell := _CELL.match(text, at)):
        needed = needed or bool(cell[1] and (at == 0 or not _NEED_MARKS.isdisjoint(cell[1])))
        at = cell.end()
    if at >= len(text):
        return needed
    if doubled := _DOUBLED.search(text):
        line, other = (1 + text.count("\n", 0, where) for where in (at, doubled.start()))
        raise UnreadableError(
            line,
            f"has quotation marks as text, and line {other} as a spreadsheet writes them: save the file as CSV",
        )
    return False


def _under_a_header(records: Iterator[Record], other_cells: str) -> Read:
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
            yield Fault(
                line, f"its number of cells is {len(cells)}, the header's is {len(names)}: {other_cells}"
            )


def _jsonl(source: Source) -> Read:
    for number, line in enumerate(source.lines(), 1):
        if line.strip():
            yield _from_json(number, line)


#: What structures JSON, and texts, in which these signs do not; one that is never closed reaches to the end.
_STRUCTURE: Final = re.compile(r'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)|[\[\]{},]', re.DOTALL)
_NAME: Final = re.compile(r'\s*"([^"]*)"\s*:\s*')


def _json(source: Source) -> Read:
    text = source.whole()
    start = len(text) - len(text.lstrip())
    if text.startswith("[", start):
        yield from _items(text, start, in_all=True)
    elif not text.startswith("{", start):
        raise UnreadableError(1, "is no JSON list or object: call a file with a prompt in each line .txt")
    else:
        members = list(islice(_members(text, start), MOST_COLUMNS + 1))
        if text[members[-1][1] + 1 :].strip():
            yield from _jsonl(source)  # what many call .json
            return
        named = [match for begin, _ in members if (match := _NAME.match(text, begin))]
        lists = [match for match in named if text.startswith("[", match.end())]
        if not lists or any(plain_name(match[1]) == "prompt" for match in named):
            yield _from_json(1, text)
        elif len(lists) == 1:
            yield from _items(text, lists[0].end())
        else:
            names = ", ".join(repr(match[1][:60]) for match in lists[:5])
            raise UnreadableError(1, f"holds {len(lists)} lists ({names}): leave the one with the prompts")


def _items(text: str, start: int, *, in_all: bool = False) -> Read:
    """Yield the rows of the list that opens at `start`; nothing may follow one that is all of the text."""
    line, counted, end = 1, 0, start
    for begin, end in _members(text, start):
        item = text[begin : min(end, begin + LONGEST_LINE + 1)]
        first = begin + len(item) - len(item.lstrip())
        line, counted = line + text.count("\n", counted, first), first
        if len(item) > LONGEST_LINE:
            yield Fault(line, f"is longer than {LONGEST_LINE:,} characters")
        elif item.strip() or begin > start + 1:
            yield _from_json(line, item.strip())
    if in_all and text[end + 1 :].strip():
        yield Fault(line, "is the last in its list, and after that something follows that is no JSON")


def _members(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Yield where the members of the list or object that opens at `start` begin and end."""
    depth, begin = 0, start + 1
    for found in _STRUCTURE.finditer(text, start):
        sign = found[0]
        if sign in ("[", "{"):
            depth += 1
        elif sign in ("]", "}"):
            depth -= 1
            if not depth:
                yield begin, found.start()
                return
        elif sign == "," and depth == 1:
            yield begin, found.start()
            begin = found.end()
    raise UnreadableError(1 + text.count("\n", 0, begin), "is not JSON: what opens before it is never closed")


def _from_json(number: int, line: str) -> Row | Fault:
    """Return the row of an object, or of a text, which is a prompt."""
    try:
        # objects become tuples of pairs, so that a name that occurs twice is seen
        value = json.loads(
            line, object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=_refuse
        )
    except json.JSONDecodeError as error:
        return Fault(number + error.lineno - 1, f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Fault(number, f"is not JSON: {error}")
    if isinstance(value, str) and line.lstrip().startswith('"'):  # a number is a str, too
        return Row(number, (value,), ("prompt",), number)
    if not isinstance(value, tuple):
        return Fault(number, "is neither a JSON object nor a text")
    facts = dict(value)
    if isinstance(facts.get("body"), tuple) and facts.keys() & {"custom_id", "url"}:
        asked = (facts.get("method") or "POST", facts.get("url") or _ENDPOINT)
        if asked != ("POST", _ENDPOINT):
            shown = " ".join(str(part)[:60] for part in asked)
            return Fault(
                number, f"asks for {shown}; only POST {_ENDPOINT} can be asked here: leave the line out"
            )
        value = (*(pair for pair in value if pair[0] not in ("method", "url", "body")), *facts["body"])
    names, cells = tuple(name for name, _ in value), tuple(_of_json(given) for _, given in value)
    return Row(number, cells, names, number)


def _of_json(value: Any) -> Cell:
    if isinstance(value, list | tuple):
        return NESTED
    return value if isinstance(value, str) else _JSON_CELLS[value]


#: What OpenAI's Batch API calls the request that we send.
_ENDPOINT: Final = "/v1/images/generations"
NESTED: Final = Unfit("a list or an object")
_JSON_CELLS: Final[Mapping[bool | None, Cell]] = {None: None, True: "true", False: "false"}


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no value")


#: What reads a file, by its extension.
READERS: Final = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".tab": _tsv,
    ".txt": _txt,
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
}
