"""Prompts files as people have them: text, JSON, OpenAI's Batch API, spreadsheets, Parquet, and other encodings."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from prefect_ttapi.batch import prompts
from prefect_ttapi.batch.prompts import read_prompts, rows_of
from prefect_ttapi.batch.tables import LARGEST_FILE, MOST_ROWS, Fault, Row, Unfit
from prefect_ttapi.errors import PromptsError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import Keys, KeyTemplate

cells = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12
).filter(str.strip)


def workbook(*rows: list[Any], more: tuple[str, ...] = (), hide: bool = False) -> bytes:
    """A workbook with these rows in its first sheet, as openpyxl and pandas write it."""
    book = openpyxl.Workbook()
    sheet = book.active
    for row in rows:
        sheet.append(row)
    for title in more:
        book.create_sheet(title).append(["prompt", title])
    if hide:
        sheet.sheet_state = "hidden"
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def parquet_file(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file, **options)
    return file.getvalue()


def prompts_of(made: Any) -> list[str]:
    return [request.prompt for request in made.requests]


class TestText:
    def test_each_line_is_a_prompt(self, read: Any) -> None:
        """Commas, marks and tabs are text; blank lines and a byte-order mark are none."""
        made = read('\ufeffa red car\r\n\r\n  \na cat, "sleeping"\tin a box\n#1 dad', "p.txt")
        assert prompts_of(made) == ["a red car", 'a cat, "sleeping"\tin a box', "#1 dad"]
        assert made.values == [{}, {}, {}]

    @given(st.lists(cells, min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]))
    def test_any_lines_are_read_back(
        self, tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str
    ) -> None:
        """What stands in a line is the prompt."""
        path = tmp_path_factory.mktemp("text") / "p.txt"
        path.write_bytes(end.join(lines).encode())
        assert prompts_of(read_prompts(path)) == lines


class TestJson:
    @pytest.mark.parametrize(
        "data",
        [
            '["a red car", "a cat"]',
            ' [\n"a red car"\n,\n{"prompt": "a cat"}]\n',
            '[{"prompt": "a red car"}, {"Prompt": "a cat", "tags": ["x", {"y": "]"}]}]',
            '{"version": 1, "meta": {"by": ["me"]}, "prompts": ["a red car", "a cat"]}',
            '{"data": [{"prompt": "a red car"}, {"prompt": "a cat"}]}',
            '{"prompt": "a red car"}\n{"prompt": "a cat"}\n',
        ],
    )
    def test_a_list_of_texts_or_objects(self, read: Any, data: str) -> None:
        """A list, the one list in an object, and JSON Lines under the wrong name are rows."""
        assert prompts_of(read(data, "p.json")) == ["a red car", "a cat"]

    def test_one_object_is_one_row(self, read: Any) -> None:
        """An object with a prompt is a request, whatever lists it has."""
        assert prompts_of(read('{"prompt": "a cat", "tags": ["x", "y"]}', "p.json")) == ["a cat"]

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ('{"a": ["x"], "b": ["y"]}', "line 1: holds 2 lists ('a', 'b'): leave the one with the prompts"),
            ('[\n"a cat",\n1]', "line 3: is neither a JSON object nor a text"),
            ('["a cat",\n]', "line 2: is not JSON: Expecting value"),
            ('["a cat"', "line 1: is not JSON: what opens before it is never closed"),
            (
                '["a cat"] x',
                "line 1: is the last in its list, and after that something follows that is no JSON",
            ),
            ('["a cat\\"', "line 1: is not JSON: what opens before it is never closed"),
            ("a red car\n", "line 1: is no JSON list or object: call a file with a prompt in each line .txt"),
            ('[{"prompt": "x",\n\n "n": }]', "line 3: is not JSON: Expecting value"),
            ("[" * 100_000 + "]" * 100_000, "line 1: is not JSON: "),
            ('["' + "x" * 1_000_001 + '"]', "line 1: is longer than 1,000,000 characters"),
            ('{"a": 1, ' * 2000, "line 1: is not JSON: what opens before it is never closed"),
        ],
    )
    def test_what_can_not_be_used_is_told(self, problems: Any, data: str, says: str) -> None:
        """A line, and what is wrong there; nothing hangs or takes more memory than the file."""
        assert problems(data, "p.json")[0].startswith(says)

    def test_escaped_marks_without_end_take_no_time(self, problems: Any) -> None:
        """A text that is never closed, and full of escapes, is looked through once."""
        assert "never closed" in problems('["' + '\\"' * 300_000, "p.json")[0]

    @given(
        st.lists(
            cells | st.dictionaries(cells, st.none() | st.booleans() | st.lists(cells) | cells, max_size=4),
            max_size=6,
        ),
        st.sampled_from([None, 2]),
        st.booleans(),
    )
    def test_any_list_is_read_back(self, items: list[Any], indent: int | None, wrapped: bool) -> None:
        """Texts and objects come back, nulls as nulls, and lists are set aside."""
        text = json.dumps({"v": "[", "rows": items} if wrapped else items, indent=indent)
        words = {True: "true", False: "false", None: None}
        expected = [
            [("prompt", item)]
            if isinstance(item, str)
            else [
                (name, Unfit("a list or an object") if isinstance(value, list) else words.get(value, value))
                for name, value in item.items()
            ]
            for item in items
        ]
        rows = [row for row in rows_of(text.encode(), ".json") if isinstance(row, Row)]
        assert [list(zip(row.names, row.cells, strict=True)) for row in rows] == expected


class TestJsonLines:
    def test_lists_and_objects_that_nobody_uses_do_no_harm(self, read: Any, problems: Any) -> None:
        """They are left out of the values; a field or a key template that needs one is told its line."""
        data = '{"prompt": "a cat", "tags": ["x"], "meta": {"a": 1}, "sku": null}\n{"prompt": "b", "tags": "y"}\n'
        made = read(data, "p.jsonl")
        assert made.values == [{"sku": None}, {"tags": "y"}]
        assert problems(data, "p.jsonl", key="{tags}.{ext}") == [
            "line 1: tags holds a list or an object, of which no key can be made"
        ]
        assert problems('{"prompt": ["a", "b"]}\n', "p.jsonl") == [
            "line 1: prompt holds a list or an object: text is needed"
        ]
        assert problems('{"prompt": "a", "size": {"w": 1}}\n', "p.jsonl") == [
            "line 1: size holds a list or an object: text is needed"
        ]

    def test_a_null_that_a_key_needs_is_told_with_line_and_column(self, problems: Any) -> None:
        """Null and blank are told apart; `name` falls back to the prompt."""
        data = '{"prompt": "a", "sku": null}\n{"prompt": "b", "sku": " "}\n{"prompt": "c", "sku": "1"}\n'
        assert problems(data, "p.jsonl", key="{sku}.{ext}") == [
            "line 1: sku is null, and the key template needs it",
            "line 2: sku is blank, and the key template needs it",
        ]


class TestBatchApi:
    LINE = '{"custom_id": "i-1", "method": "POST", "url": "/v1/images/generations", "body": %s}\n'

    def test_the_body_is_the_request(self, read: Any) -> None:
        """Lines for OpenAI's Batch API: the body's fields are the request's, custom_id is a value."""
        body = {
            "model": "gpt-image-1",
            "prompt": "a car",
            "n": 1,
            "output_format": "webp",
            "output_compression": 80,
        }
        made = read(self.LINE % json.dumps(body), "p.jsonl")
        assert made.requests == [ImageRequest(**body)]
        assert made.values == [{"custom_id": "i-1"}]

    @pytest.mark.parametrize(
        ("old", "new", "asks"),
        [
            ("/v1/images/generations", "/v1/images/edits", "POST /v1/images/edits"),
            ("/v1/images/generations", "/v1/chat/completions", "POST /v1/chat/completions"),
            ("POST", "GET", "GET /v1/images/generations"),
        ],
    )
    def test_what_asks_for_something_else_is_refused(
        self, problems: Any, old: str, new: str, asks: str
    ) -> None:
        """Another url or method can't be sent: its line is told."""
        line = self.LINE % '{"prompt": "a car"}'
        assert problems(line + line.replace(old, new), "p.jsonl") == [
            f"line 2: asks for {asks}; only POST /v1/images/generations can be asked here: leave the line out"
        ]

    def test_a_body_of_ones_own_is_a_value(self, read: Any) -> None:
        """A column called body makes no line one of the Batch API's."""
        assert read('{"prompt": "x", "body": "steel", "url": "u"}\n', "p.jsonl").values == [
            {"body": "steel", "url": "u"}
        ]


class TestWorkbooks:
    def test_the_first_visible_sheet_is_read(self, read: Any) -> None:
        """Numbers, dates and truth as a person writes them, empty cells as nulls; which sheet was taken is said."""
        data = workbook(
            [None],
            ["Prompt", "n", "SKU", "Shot on", "Price", "Sold"],
            ["a red car", 2, "007", datetime(2031, 5, 4), 3.5, True],
            [],
            ["a cat", None, 7.0, datetime(2031, 5, 4, 12, 30), None, False],
            more=("other",),
        )
        made = read(data, "p.xlsx")
        assert made.requests == [ImageRequest(prompt="a red car", n=2), ImageRequest(prompt="a cat")]
        assert made.values == [
            {"sku": "007", "shot_on": "2031-05-04", "price": "3.5", "sold": "true"},
            {"sku": "7", "shot_on": "2031-05-04 12:30:00", "price": None, "sold": "false"},
        ]
        assert made.notes == ("the sheet 'Sheet' is read, and no other",)
        hidden = workbook(["prompt"], ["hidden"], more=("shown",), hide=True)
        with pytest.raises(PromptsError, match="has no rows"):
            read(hidden, "p.xlsm")

    def test_formulas_count_once_they_are_calculated(self, problems: Any, read: Any) -> None:
        """What a program wrote as a formula, and no spreadsheet has calculated, has no value; nor has an error."""
        data = workbook(["prompt", "x"], ['="a "&"cat"', "=1+1"], ["#N/A", None], ["a dog", "=2"])
        assert problems(data, "p.xlsx") == [
            "row 2: prompt holds a formula that was never calculated: open and save the file in a spreadsheet program: "
            "text is needed",
            "row 3: prompt holds the error #N/A: text is needed",
        ]
        assert read(workbook(["prompt", "x"], ["a dog", "=2"]), "p.xlsx").values == [{}]

    def test_a_cell_beyond_the_header_is_told(self, problems: Any) -> None:
        """Its row, and the column that has no name."""
        assert problems(workbook(["prompt", "x"], ["a", 1, None, "out"]), "p.xlsx") == [
            "row 2: has a cell in column 4, but the header has 2: name the column"
        ]

    def test_a_link_is_its_text(self, read: Any) -> None:
        """A cell with a hyperlink is the text that it shows; nothing is fetched."""
        book = openpyxl.Workbook()
        book.active.append(["prompt", "source"])
        book.active.append(["a cat", "the page"])
        book.active["B2"].hyperlink = "https://example.com/"
        file = io.BytesIO()
        book.save(file)
        assert read(file.getvalue(), "p.xlsx").values == [{"source": "the page"}]

    @settings(max_examples=25)
    @given(
        st.integers(1, 4).flatmap(
            lambda width: st.lists(
                st.lists(st.none() | cells, min_size=width, max_size=width).filter(any),
                min_size=1,
                max_size=5,
            )
        )
    )
    def test_any_sheet_is_read_back(self, table: list[list[str | None]]) -> None:
        """Texts and empty cells come back as they were written."""
        # what begins with = is a formula, #N/A an error, and _x0041_ is Excel's own way to write an A
        table = [[cell and f"t{cell}".replace("_x", "") for cell in row] for row in table]
        data = workbook([f"c{at}" for at in range(len(table[0]))], *table)
        rows = [row for row in rows_of(data, ".xlsx") if isinstance(row, Row)]
        assert [list(row.cells) for row in rows] == table
        assert [row.line for row in rows] == list(range(2, len(table) + 2))

    def test_bombs_and_damage_are_told(self, problems: Any) -> None:
        """A file that unpacks to too much, or is none, is refused before anything is read into memory."""
        bomb = io.BytesIO()
        with (
            zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True) as part,
        ):
            for _ in range(LARGEST_FILE // 2**24 + 1):
                part.write(bytes(2**24))
        (line,) = problems(bomb.getvalue(), "p.xlsx")
        assert line.startswith("row 1: unpacks to 285,212,672 bytes: the most is 268,435,456")
        good = workbook(["prompt"], ["a cat"])
        name = good.index(b"xl/worksheets/sheet1.xml")
        for bad in (
            good[: len(good) // 2],
            good[: name + 40] + b"\x00\x01" + good[name + 42 :],
            b"PK\x03\x04",
        ):
            (line,) = problems(bad, "p.xlsx")
            assert "save it again" in line

    def test_a_part_that_is_longer_than_it_says_is_damage(self, problems: Any) -> None:
        """The sizes in the archive's index are claims: what unpacks to more is not read on."""
        file = io.BytesIO(workbook(["prompt"], ["a cat"]))
        with zipfile.ZipFile(file) as archive:
            part = archive.getinfo("xl/worksheets/sheet1.xml")
        data = file.getvalue()
        central = data.rindex(b"PK\x01\x02", 0, data.rindex(b"xl/worksheets/sheet1.xml"))
        size = central + 24
        assert int.from_bytes(data[size : size + 4], "little") == part.file_size
        lying = data[:size] + (100).to_bytes(4, "little") + data[size + 4 :]
        (line,) = problems(lying, "p.xlsx")
        assert "save it again" in line

    def test_a_cell_at_the_far_end_takes_no_memory(self, problems: Any) -> None:
        """A sheet is read row by row: a stray cell in its last column costs a row."""
        book = openpyxl.Workbook()
        book.active["A1"], book.active["A2"], book.active["XFD9"] = "prompt", "a cat", "far"
        file = io.BytesIO()
        book.save(file)
        assert problems(file.getvalue(), "p.xlsx") == [
            "row 9: has a cell in column 16384, but the header has 1: name the column"
        ]


class TestParquet:
    def test_typed_columns_are_texts(self, read: Any) -> None:
        """Numbers, dates and nulls as in a sheet; lists, structs and bytes are set aside, pandas' index left out."""
        data = parquet_file(
            {
                "prompt": ["a red car", "a cat"],
                "n": pyarrow.array([2, None], pyarrow.int64()),
                "score": [0.5, float("nan")],
                "day": [date(2031, 5, 4), None],
                "kind": pyarrow.array(["x", "x"]).dictionary_encode(),
                "tags": [["a"], []],
                "image": [{"bytes": b"x" * 100}, None],
                "raw": [b"x", b"y"],
                "__index_level_0__": [0, 1],
            }
        )
        made = read(data, "p.parquet")
        assert made.requests == [ImageRequest(prompt="a red car", n=2), ImageRequest(prompt="a cat")]
        assert made.values == [
            {"score": "0.5", "day": "2031-05-04", "kind": "x"},
            {"score": None, "day": None, "kind": "x"},
        ]
        assert made.columns == ("score", "day", "kind", "tags", "image", "raw")

    @given(
        st.integers(1, 4).flatmap(
            lambda width: st.lists(
                st.lists(
                    st.none() | st.text(st.characters(codec="utf-8"), max_size=9),
                    min_size=width,
                    max_size=width,
                ),
                min_size=1,
                max_size=5,
            )
        )
    )
    def test_any_table_is_read_back(self, table: list[list[str | None]]) -> None:
        """Texts and nulls come back as they were written."""
        columns = {
            f"c{at}": pyarrow.array(column, pyarrow.string())
            for at, column in enumerate(zip(*table, strict=True))
        }
        rows = [row for row in rows_of(parquet_file(columns), ".parquet") if isinstance(row, Row)]
        assert [list(row.cells) for row in rows] == table

    def test_what_is_too_much_is_told_from_the_footer(self, problems: Any) -> None:
        """Rows, columns and bytes are told before a value is unpacked."""
        ones = pyarrow.array([""] * (MOST_ROWS + 1))
        assert "has 250,001 rows" in problems(parquet_file({"prompt": ones}), "p.parquet")[0]
        many = {f"c{number}": [""] for number in range(1001)}
        assert "1,001 columns" in problems(parquet_file(many), "p.parquet")[0]
        (line,) = problems(b"PAR1" + bytes(100), "p.parquet")
        assert line.startswith("row 1: is no Parquet file that can be read")

    def test_a_text_that_many_rows_share_is_bounded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is small in the file may unfold to more than memory: reading ends at the bound."""
        monkeypatch.setattr(prompts, "LARGEST_FILE", 10_000_000)
        path = tmp_path / "p.parquet"
        shared = pyarrow.array(["x" * 900_000] * 400).dictionary_encode()
        path.write_bytes(parquet_file({"prompt": ["a"] * 400, "v": shared}))
        assert path.stat().st_size < 200_000
        with pytest.raises(PromptsError, match="is too much: the most is"):
            read_prompts(path)


@pytest.mark.parametrize(
    ("extension", "module", "extra"), [("xlsx", "openpyxl", "xlsx"), ("parquet", "pyarrow", "parquet")]
)
def test_a_missing_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str, module: str, extra: str
) -> None:
    """Where a reader is not installed, the line says what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"p.{extension}"
    path.write_bytes(b"x")
    with pytest.raises(PromptsError) as caught:
        read_prompts(path)
    assert str(caught.value) == f'{str(path)!r} needs {module}: pip install "prefect-ttapi[{extension}]"'


class TestEncodings:
    def test_windows_1252_is_named_and_read(self, read: Any, problems: Any) -> None:
        """A file that Excel wrote in Windows' own encoding: the line and the option are told, then it is read."""
        data = "prompt;name\r\nein Auto für Köln – Studio;auto\r\n".encode("windows-1252")
        (line,) = problems(data)
        assert line.startswith("line 2: 'prompt' holds something that is no text in UTF-8")
        assert line.endswith("e.g. --encoding windows-1252")
        assert prompts_of(read(data, encoding="windows-1252")) == ["ein Auto für Köln – Studio"]

    @pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.txt", "p.json", "p.jsonl"])
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_utf_16_with_a_mark_needs_no_option(self, read: Any, name: str, encoding: str) -> None:
        """A spreadsheet's "Unicode text" says itself what it is."""
        data = (
            '[\n{"prompt": "猫"}]'
            if name == "p.json"
            else '{"prompt": "猫"}\n'
            if name == "p.jsonl"
            else "prompt\n猫\n"
        )
        mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
        for options in ({}, {"encoding": encoding}):
            made = read((mark + data).encode(encoding), name, **options)
            assert prompts_of(made) == (["prompt", "猫"] if name == "p.txt" else ["猫"])

    def test_utf_16_without_a_mark_is_suggested(self, problems: Any) -> None:
        """Zero bytes between letters: the line names the encoding."""
        assert "--encoding utf-16" in problems("prompt\ncat\n".encode("utf-16-le"))[0]

    @pytest.mark.parametrize("encoding", ["nonsense", "rot13", "a\0b", "undefined"])
    def test_an_unknown_encoding_is_told(self, read: Any, encoding: str) -> None:
        """The name is repeated, with some that there are."""
        with pytest.raises(PromptsError, match=r"windows-1252, utf-16, mac_roman|is not text in undefined"):
            read("prompt\nx\n", encoding=encoding)

    @pytest.mark.parametrize(
        ("encoding", "data"),
        [
            ("windows-1252", b"prompt\nx\x81\n"),
            ("shift_jis", b"prompt\nx\x81\n"),
            ("utf-16", "prompt\nx\ud800\n".encode("utf-16", "surrogatepass")),
            ("utf-32", "prompt\nx".encode("utf-32") + b"\xff\xff\xff\xff"),
        ],
    )
    def test_bytes_that_are_not_in_it_are_told(self, problems: Any, encoding: str, data: bytes) -> None:
        """Whatever the encoding, what is no text in it is an error with a line."""
        (line, *_) = problems(data, encoding=encoding)
        assert line.startswith("line ")

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (workbook(["prompt"], ["x"]), "is a workbook or another ZIP file: call it .xlsx"),
            (parquet_file({"prompt": ["x"]}), "is Parquet: call it .parquet"),
            (b"\x1f\x8bxx", "is compressed: unpack it"),
            (b"\xd0\xcf\x11\xe0xx", "is an old Excel file: save it as .xlsx or CSV"),
        ],
    )
    def test_other_kinds_under_the_name_of_text(self, problems: Any, data: bytes, says: str) -> None:
        """A workbook called .csv is told for what it is."""
        for name in ("p.csv", "p.tsv", "p.json", "p.txt"):
            assert says in problems(data, name)[0]


@given(
    st.binary(max_size=300),
    st.sampled_from([b"PK\x03\x04", b"PAR1", b""]),
    st.sampled_from([".xlsx", ".parquet"]),
)
def test_any_bytes_give_rows_or_faults(data: bytes, start: bytes, extension: str) -> None:
    """No bytes make a reader raise."""
    assert all(isinstance(row, Row | Fault | str) for row in rows_of(start + data + start, extension))


def test_a_hundred_thousand_columns_are_told(problems: Any) -> None:
    """In each kind the header's line and the most that there may be; nothing else of the file is looked at."""
    names = [f"c{number}" for number in range(100_000)]
    assert problems(f"{','.join(names)}\n{',' * 99_999}x\n") == [
        "line 1: has 100,000 columns; the most is 1,000: leave out some"
    ]
    assert problems("[" + json.dumps(dict.fromkeys(names[:60_000], 1)) + "]", "p.json") == [
        "line 1: has 60,000 columns; the most is 1,000: leave out some"
    ]
    assert problems(workbook(names[:9_000], ["x"] * 9_000), "p.xlsx") == [
        "row 1: has 9,000 columns; the most is 1,000: leave out some"
    ]


def test_control_characters_do_no_harm_where_nobody_uses_them(read: Any, problems: Any) -> None:
    """What PowerPoint leaves in a description is a fault in a prompt, and a value like any other elsewhere."""
    assert read("prompt,note\nx,a\x0bb\n").values == [{"note": "a\x0bb"}]
    assert problems("prompt,note\na\x0bb,x\n") == [
        "line 2: 'prompt' holds the control character U+000B: take it out there"
    ]


def test_a_column_n_that_counts_up_is_asked_about(problems: Any, read: Any) -> None:
    """Three rows or more that count up may be row numbers, whichever of them have prompts: unless it is meant."""
    assert problems("n,prompt\n1,x\n2,y\n3,z\n")[0].startswith("line 1: column 'n' counts up")
    assert problems("n,prompt\n1,x\n2,\n3,z\n4,w\n", skip_blank=True)[0].startswith(
        "line 1: column 'n' counts up"
    )
    assert problems(workbook(["n", "prompt"], [4, "x"], [5, "y"], [6, "z"]), "p.xlsx")[0].startswith(
        "row 1: column 'n'"
    )
    for meant in ([1, 2], [1, 2, 2], [2, 2, 2], [3, 2, 1]):
        rows = "".join(f"{n},x\n" for n in meant)
        assert [request.n for request in read(f"n,prompt\n{rows}").requests] == meant
    assert [request.n for request in read("n,prompt\n1,x\n2,y\n3,z\n", columns={"n": "n"}).requests] == [
        1,
        2,
        3,
    ]
    none = read("n,prompt\n1,x\n2,y\n3,z\n", columns={"n": None})
    assert ([request.n for request in none.requests], none.values[2]) == ([1, 1, 1], {"n": "3"})


class TestColumns:
    def test_fields_come_from_the_columns_that_are_named(self, read: Any) -> None:
        """One field from another column, one from none; a prompt named this way is one named by prompt_column."""
        data = "Title,Size,px,Model\nshirt,M,512x512,AX\n"
        for options in (
            {"prompt_column": "Title", "columns": {"size": "px", "model": None}},
            {"columns": {"prompt": "title", "size": "PX", "model": None}},
        ):
            made = read(data, **options)
            assert made.requests == [ImageRequest(prompt="shirt", size="512x512")]
            assert made.values == [{"Size": "M", "Model": "AX"}]

    def test_a_shop_s_own_size_is_named_as_it_is_written(
        self, read: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """`{Size}` is the column, `{size}` the image's; that it is meant needs no warning."""
        key = "{Title}-{Size}-{size}.{ext}"
        made = read("Title,Size,text\nshirt,M,a shirt\n", columns={"prompt": "text", "size": None}, key=key)
        template = KeyTemplate(key, ["title", "Size"])
        keys = Keys(template, made.requests[0], datetime(2031, 5, 4, tzinfo=UTC), made.values[0])
        (planned,) = keys.planned()
        assert planned.startswith("shirt-M-")
        assert not caplog.records

    def test_what_is_hidden_by_an_illegal_model_is_told_with_it(self, problems: Any) -> None:
        """One hint names all columns that would be illegal as fields, and the rows are fine with it."""
        data = "Title,Size,Style,Model\nshirt,M,casual,AX-200\nshirt,L,casual,AX-200\n"
        assert "--columns size=,style=,model= makes" in problems(data, prompt_column="Title")[-1]

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"columns": {"sise": "x"}}, "'sise' is no field of an image request; did you mean size?"),
            ({"columns": {"prompt": None}}, "columns must name one for the prompts"),
            ({"columns": {"prompt": "x"}, "prompt_column": "y"}, "and so does prompt_column: leave out one"),
            ({"columns": {"size": "px"}}, "line 1: no column is named 'px'; columns: 'prompt'"),
        ],
    )
    def test_columns_that_can_not_be_are_told(self, read: Any, options: dict[str, Any], says: str) -> None:
        """A field that is none, a column that is not there."""
        with pytest.raises(PromptsError) as caught:
            read("prompt\nx\n", **options)
        assert says in str(caught.value)

    def test_a_shop_with_rows_for_further_pictures(self, read: Any, problems: Any) -> None:
        """Rows without a title are errors that name the option, or passed over and counted."""
        data = "Handle,Title,Image Src\npot,Clay pot,a.jpg\npot,,b.jpg\nvase,Vase,c.jpg\n"
        assert problems(data, prompt_column="Title") == [
            "line 3: the prompt is blank: fill it in, or pass over such rows with --skip-blank"
        ]
        made = read(data, prompt_column="Title", skip_blank=True)
        assert prompts_of(made) == ["Clay pot", "Vase"]
        assert made.notes == ("rows without a prompt, passed over: 1",)
        assert len(read(data, prompt_column="Title", skip_blank=True, limit=2).requests) == 2
        with pytest.raises(PromptsError, match="has no rows with a prompt"):
            read("Title,x\n,1\n", prompt_column="Title", skip_blank=True)
