"""The formats of prompts files: what was written is what is read, and nothing hostile gets through."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.batch import workbooks
from prefect_ttapi.batch.prompts import READERS, rows_of
from prefect_ttapi.batch.tables import LONGEST_LINE, Fault, Row


def cells_of(data: bytes, extension: str) -> list[tuple[str, ...]]:
    """The cells of a file without faults."""
    rows = list(rows_of(data, extension))
    assert not [row for row in rows if isinstance(row, Fault)], rows
    return [row.cells for row in rows if isinstance(row, Row)]


def faults_of(data: bytes, extension: str) -> list[tuple[int, str]]:
    return [(row.line, row.message) for row in rows_of(data, extension) if isinstance(row, Fault)]


cells = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
tables = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=6)
)


@given(
    tables,
    # with other line ends, csv.writer itself leaves a bare CR or LF in a cell unquoted
    st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), *((end, csv.QUOTE_ALL) for end in ("\n", "\r\n", "\r"))]),
    st.booleans(),
)
def test_any_table_that_csv_writes_is_read_back(table: list[list[str]], style: Any, mark: bool) -> None:
    """Whatever is in the cells (commas, quotation marks, line ends, any script), CSV gives it back."""
    end, quoting = style
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=end, quoting=quoting).writerows([["x,"] * len(table[0]), *table])
    data = file.getvalue().encode("utf-8-sig" if mark else "utf-8")
    assert cells_of(data, ".csv") == [tuple(row) for row in table]


plain_cells = cells.filter(lambda text: not set(text) & set("\t\r\n"))
#: A cell by which a mark can only be text: none that quotes would leave it so.
RAW = 'a 5" nail'


@given(
    st.integers(1, 5).flatmap(
        lambda width: st.lists(st.lists(plain_cells, min_size=width, max_size=width), min_size=1, max_size=6)
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([".tsv", ".tab"]),
)
def test_any_cells_joined_by_tabs_are_read_back(table: list[list[str]], end: str, extension: str) -> None:
    """Where one mark is bare, all are text: cells are what stands between tabs, whatever they hold."""
    rows = [[RAW] * len(table[0]), *table]
    data = end.join("\t".join(row) for row in rows).encode()
    read = list(rows_of(data, extension))
    if isinstance(read[-1], Fault):  # a cell that only a spreadsheet would write, or else nobody can tell
        assert "as a spreadsheet writes them" in read[-1].message
        assert any(
            cell.startswith('"') and cell.endswith('"') and '""' in cell[1:-1]
            for row in table
            for cell in row
        )
    else:
        assert [row.cells for row in read if isinstance(row, Row)] == [tuple(row) for row in table]


@given(tables, st.sampled_from(["\n", "\r\n"]), st.sampled_from([".tsv", ".csv"]), st.booleans())
def test_any_table_that_is_written_with_tabs_is_read_back(
    table: list[list[str]], end: str, extension: str, all_quoted: bool
) -> None:
    """What pandas' to_csv and Excel write with tabs comes back, tabs, marks and line ends in cells too."""
    width = len(table[0])
    if (
        not all_quoted
    ):  # with LF for an end, the csv module itself leaves a bare CR unquoted, and pandas does not
        table = [row for row in table if not any("\r" in cell for cell in row)]
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
    writer = csv.writer(file, "excel-tab", lineterminator=end, quoting=quoting)
    writer.writerows([["x\ty"] * width, *table])
    # without a tab between names, a .csv is no file with tabs
    kind = extension if width > 1 else ".tsv"
    assert cells_of(file.getvalue().encode(), kind) == [tuple(row) for row in table]


json_texts = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    st.lists(st.dictionaries(json_texts, json_texts, min_size=1, max_size=4), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_objects_of_text_are_read_back(objects: list[dict[str, str]], ascii_only: bool) -> None:
    """JSON Lines give back names and texts, escaped or not."""
    data = "\n".join(json.dumps(thing, ensure_ascii=ascii_only) for thing in objects).encode()
    rows = [row for row in rows_of(data, ".jsonl") if isinstance(row, Row)]
    assert [dict(zip(row.names, row.cells, strict=True)) for row in rows] == objects
    assert [row.line for row in rows] == list(range(1, len(objects) + 1))


TEXT = sorted(READERS.keys() - workbooks.READERS.keys())
LINES = sorted({*TEXT} - {".json"})


@given(st.binary(max_size=300), st.sampled_from(sorted(READERS)))
def test_any_bytes_give_rows_or_faults(data: bytes, extension: str) -> None:
    """No bytes make a reader raise; a row has as many names as texts, lines never go back."""
    last = 0
    for row in rows_of(data, extension):
        if isinstance(row, str):
            continue
        assert row.line >= last
        last = row.line
        if isinstance(row, Row):
            assert len(row.names) == len(row.cells)


@given(
    st.lists(
        st.sampled_from(['"', ",", ";", "\n", "\r", "\t", "a", "é", "{", "}", ":", "[", "\\", "\x00", " "])
    )
)
def test_any_jumble_of_marks_gives_rows_or_faults(marks: list[str]) -> None:
    """The characters that mean something to a format, in any order, do not make a reader raise."""
    for extension in READERS:
        assert all(isinstance(row, Row | Fault | str) for row in rows_of("".join(marks).encode(), extension))


def test_lines_are_those_of_an_editor() -> None:
    """A row is where it starts, after cells that span lines and after empty rows."""
    data = b'a,b\r\n"one\r\ntwo\r\n",x\r\n\r\n,\r\n"three\n",y\nz\n'
    assert [row.line for row in rows_of(data, ".csv")] == [2, 7, 9]
    ((line, message),) = faults_of(data, ".csv")
    assert line == 9
    assert message.startswith(
        "its number of cells is 1, the header's is 2: quotation marks belong around a cell"
    )


def test_the_header_may_span_lines_too() -> None:
    """names_line is where the names start, also after empty lines; in JSON Lines each row has its own."""
    (row,) = rows_of(b'\n\n"a\nb",c\n1,2\n', ".csv")
    assert isinstance(row, Row)
    assert (row.line, row.names_line, row.names) == (5, 3, ("a\nb", "c"))
    rows = rows_of(b'{"a":1}\n\n{"b":2}', ".ndjson")
    assert [row.names_line for row in rows if isinstance(row, Row)] == [1, 3]


def test_empty_rows_are_left_out() -> None:
    """Empty lines and rows of nothing but separators are no rows; an empty quoted cell is one."""
    assert cells_of(b"a,b\n\n1,2\n,\n  , \n\r\n", ".csv") == [("1", "2")]
    assert cells_of(b"a\tb\n\n1\t2\n\t\n \n", ".tsv") == [("1", "2")]
    assert cells_of(b'a\n\n""\n1\n', ".csv") == [("",), ("1",)]
    assert cells_of(b'\n{"a": 1}\n \n', ".jsonl") == [("1",)]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"a,b\n", b"a,b\n,\n"])
def test_no_rows(data: bytes) -> None:
    """A file without rows has neither rows nor faults."""
    assert list(rows_of(data, ".csv")) == []


@pytest.mark.parametrize(
    ("header", "separator"),
    [
        *[
            ("a;b", ";"),
            ('"a;";b', ";"),
            ("a,b;c", ","),
            ("a;b,c", ","),
            ("a", ","),
            ("a\tb", "\t"),
            ("a|b", "|"),
        ],
        *[("a;b;c,d", ";"), ('"a,b,c";d', ";"), ('"a,b\tc",d', ","), ('"a\tb"\tc', "\t")],
    ],
)
def test_what_is_most_in_the_header_separates_cells(header: str, separator: str) -> None:
    """The first line decides, without what is inside quotation marks; of as many of two, a comma does."""
    written = next(csv.reader([header], delimiter=separator))
    read = list(rows_of(f"{header}\n{separator.join('x' * len(written))}\n".encode(), ".csv"))
    row = read[-1]
    assert isinstance(row, Row)
    told = [note for note in read if isinstance(note, str)]
    assert (f"cells are separated by {separator!r}" in told) == (separator in ";|")
    assert row.names == tuple(written)
    assert row.cells == ("x",) * len(written)


def test_quotation_marks_inside_csv_cells() -> None:
    """A mark inside a bare cell is text; one that opens a cell must close it, or the fault says so."""
    assert cells_of(b'a\n5" nail\n"a ""b"""\n', ".csv") == [('5" nail',), ('a "b"',)]
    twice = "a cell goes on after its closing quotation mark; inside a cell, write it twice"
    never = "a quotation mark is opened and never closed"
    assert faults_of(b'a\n"b" c\nd\n"e" f\n"g\nh', ".csv") == [(2, twice), (4, twice), (5, never)]


def test_a_mark_never_closed_does_not_swallow_the_file_silently() -> None:
    """An open quotation mark before much text is a fault at the line of the mark."""
    data = b'a\n"open\n' + b"text\n" * 30_000
    assert faults_of(data, ".csv")[0] == (
        2,
        "a cell is too long; is a quotation mark opened and never closed?",
    )


def test_a_broken_header_ends_the_reading() -> None:
    """Without names nothing else in the file means anything."""
    assert [line for line, _ in faults_of(b'"a" b,c\n1,2\n', ".csv")] == [1]


def test_csv_limits_are_left_as_they_are() -> None:
    """The csv module's limit belongs to the whole process: reading does not change it."""
    before = csv.field_size_limit()
    list(rows_of(b'a\n"b\n', ".csv"))
    assert csv.field_size_limit() == before


def test_quotation_marks_in_tsv_may_be_text() -> None:
    """Prompts as PartiPrompts has them hold bare quotation marks, at the start of cells too."""
    data = b'p\tq\n"G I G" painted\t"quoted"\n5" nail\t"\n'
    assert cells_of(data, ".tsv") == [('"G I G" painted', '"quoted"'), ('5" nail', '"')]


def test_quotation_marks_in_tsv_may_be_a_spreadsheets() -> None:
    """Marks that are doubled, around a comma, or around all cells are no part of the text; what was taken is said."""
    for data, first in {
        b'p\tq\n"a ""red"" cat, sitting"\tx\n': 'a "red" cat, sitting',
        b'p\tq\n"a red cat, sitting"\tx\n': "a red cat, sitting",
        b'"p"\t"q"\n"a cat"\t"x"\n': "a cat",
        b'p\tq\n"a\tb\nc"\tx\n': "a\tb\nc",
    }.items():
        note, row = rows_of(data, ".tsv")
        assert note == "quotation marks around cells are a spreadsheet's, and no part of the text"
        assert isinstance(row, Row)
        assert row.cells == (first, "x")
    note, row = rows_of(b'p\tq\n"OPEN"\tx\n', ".tsv")
    assert (note, row.cells) == (
        "quotation marks are text: they are not as a spreadsheet writes them",
        ('"OPEN"', "x"),
    )


def test_quotation_marks_that_can_not_be_told_apart_are_refused() -> None:
    """A file that has both kinds is paid for under neither meaning: both lines are told."""
    data = b'p\tq\n"a ""red"" cat"\tx\n5" nail\tx\n'
    ((line, message),) = faults_of(data, ".tsv")
    assert line == 3
    assert message.startswith("has quotation marks as text, and line 2 as a spreadsheet writes them: save")


def test_json_values_become_texts_as_written() -> None:
    """Numbers keep their digits, true, false and null are words and nothing."""
    data = b'{"a": 1.10, "b": 12345678901234567890, "c": true, "d": false, "e": null, "f": "1e5", "g": -1E5}'
    written = ("1.10", "12345678901234567890", "true", "false", None, "1e5", "-1E5")
    assert cells_of(data, ".jsonl") == [written]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nope", "is not JSON: Expecting value at column 1"),
        ('{"a": 1,}', "is not JSON: "),
        ('{"a": 1} x', "is not JSON: Extra data at column 10"),
        ('{"a": NaN}', "is not JSON: NaN is no value"),
        ('{"a": -Infinity}', "is not JSON: -Infinity is no value"),
        ('{"a": "\t"}', "is not JSON: Invalid control character"),
        ('{"a": "\x00"}', "is not JSON: Invalid control character"),
        ("[1]", "is neither a JSON object nor a text"),
        ("1", "is neither a JSON object nor a text"),
        ("null", "is neither a JSON object nor a text"),
        ("[" * 100_000, "is not JSON: "),
        ('{"a":' * 100_000, "is not JSON: "),
    ],
)
def test_json_faults_have_their_line(line: str, says: str) -> None:
    """A line that is no flat JSON object is a fault of that line; others are read."""
    data = f'{{"a": 1}}\n{line}\n{{"a": 2}}\n'.encode()
    ((number, message),) = faults_of(data, ".jsonl")
    assert number == 2
    assert message.startswith(says)
    assert [row.cells for row in rows_of(data, ".jsonl") if isinstance(row, Row)] == [("1",), ("2",)]


def test_a_json_name_that_occurs_twice_is_kept_twice() -> None:
    """Nothing is lost to the last one winning: whoever reads the names sees both."""
    (row,) = rows_of(b'{"a": 1, "a": 2}', ".jsonl")
    assert isinstance(row, Row)
    assert (row.names, row.cells) == (("a", "a"), ("1", "2"))


@pytest.mark.parametrize("extension", LINES)
def test_endless_lines_end_the_reading(extension: str) -> None:
    """One line can't take more memory than its bound; what came before it is read."""
    data = b'{"a": 1}\n{"a": 2}\n' + b"x" * (LONGEST_LINE + 1) + b'\n{"a": 3}\n'
    rows = list(rows_of(data, extension))
    assert isinstance(rows[-1], Fault)
    assert rows[-1].message == "is longer than 1,000,000 characters; nothing after it was read"
    assert rows[-1].line == 3
    assert isinstance(rows[-2], Row)
