"""Prompts files as requests: columns, defaults, values, and all problems of a file in one error."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.batch.prompts import read_prompts
from prefect_ttapi.errors import PromptsError
from prefect_ttapi.requests import ImageRequest

HINT = (
    "where a column means something else than the field of its name: --columns {} makes it a value for the key "
    "template, and size=image_size takes another column"
)
UNDECODED = (
    "something that is no text in UTF-8, or in the encoding given: save the file as UTF-8, or name its encoding, "
    "e.g. --encoding windows-1252"
)
EXAMPLE = Path(__file__).parents[2] / "flows" / "prompts.csv"


def test_a_row_is_a_request_and_its_values(read: Any) -> None:
    """Columns named like fields are fields, whatever their case and blanks; others are the row's values."""
    made = read(
        'SKU, Prompt ,Model,SIZE,Product ID,n\nA1,"a ""red"" cat, sitting",gpt-image-2, 1024x1024 , 7,2\n'
    )
    assert made.requests == [
        ImageRequest(prompt='a "red" cat, sitting', model="gpt-image-2", size="1024x1024", n=2)
    ]
    assert made.values == [{"sku": "A1", "product_id": " 7"}]
    assert made.columns == ("sku", "product_id")
    assert made.path.endswith("prompts.csv")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("prompt,n,size,tag\nä cat,2,256x256,x\n", "p.csv"),
        ("prompt;n;size;tag\r\nä cat;2;256x256;x\r\n", "p.CSV"),
        ("\ufeffprompt\tn\tsize\ttag\nä cat\t2\t256x256\tx\n", "p.tsv"),
        ("prompt\tn\tsize\ttag\r\nä cat\t2\t256x256\tx", "p.Tab"),
        ('{"prompt": "ä cat", "n": 2, "size": "256x256", "tag": "x"}\n', "p.jsonl"),
        ('\ufeff{"tag": "x", "Prompt": "\\u00e4 cat", "n": "2", "SIZE": "256x256"}', "p.ndjson"),
    ],
)
def test_every_format_says_the_same(read: Any, data: str, name: str) -> None:
    """The same row is the same request in each format, with or without a byte-order mark."""
    made = read(data, name)
    assert made.requests == [ImageRequest(prompt="ä cat", n=2, size="256x256")]
    assert made.values == [{"tag": "x"}]


def test_fields_of_every_kind_are_read_from_text(read: Any) -> None:
    """Numbers and truth are understood as a spreadsheet writes them, in every field there is."""
    header = "prompt,model,n,size,quality,output_format,background,moderation,output_compression,stream,"
    row = "x,gpt-image-1,2.0,1024x1024,high,webp,opaque,low,80,TRUE,3,user-1,second\n"
    (request,) = read(header + "partial_images,user,variant\n" + row).requests
    assert request == ImageRequest(
        prompt="x",
        model="gpt-image-1",
        n=2,
        size="1024x1024",
        quality="high",
        output_format="webp",
        background="opaque",
        moderation="low",
        output_compression=80,
        stream=True,
        partial_images=3,
        user="user-1",
        variant="second",
    )
    (request,) = read("prompt,model,style,response_format\nx,dall-e-3,vivid,url\n").requests
    assert (request.style, request.response_format) == ("vivid", "url")


def test_a_rows_cell_wins_over_the_defaults(read: Any) -> None:
    """Defaults fill empty cells and missing columns; None is no default; else the vendor's default holds."""
    defaults = {"model": "dall-e-3", "size": "1792x1024", "n": None, "quality": "hd"}
    made = read("prompt,size,style,n\na,1024x1024,,1\nb, ,vivid,\n", defaults=defaults)
    assert made.requests == [
        ImageRequest(prompt="a", model="dall-e-3", size="1024x1024", quality="hd"),
        ImageRequest(prompt="b", model="dall-e-3", size="1792x1024", quality="hd", style="vivid"),
    ]


def test_a_wrong_default_is_told_once(problems: Any) -> None:
    """A default that no row can take is one line with its rows, not one line for each."""
    rows = "".join(f"prompt {number}\n" for number in range(100))
    (line,) = problems("prompt\n" + rows, defaults={"size": "1x1"})
    assert line.startswith(
        "lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 90 more: size is '1x1' for dall-e-2; legal: "
    )
    (line,) = problems("prompt\nx\n", defaults={"sise": "1x1"})
    assert line == "line 2: sise is no field of an image request; did you mean size?"


def test_another_column_can_hold_the_prompt(read: Any) -> None:
    """prompt_column names it as the file does, or nearly so; a column called prompt is then a value."""
    for wanted in ("Long Text", "long text", " long_text "):
        made = read("Prompt,Long Text,n\nshort,long,2\n", prompt_column=wanted)
        assert made.requests == [ImageRequest(prompt="long", n=2)]
        assert made.values == [{"prompt": "short"}]
    made = read("#,Text\nan odd name,y\n", prompt_column="#")
    assert (made.requests[0].prompt, made.values) == ("an odd name", [{"text": "y"}])
    made = read('{"caption": "x"}\n', "p.jsonl", prompt_column="caption")
    assert made.requests[0].prompt == "x"


def test_prompts_and_values_stand_as_they_are(read: Any) -> None:
    """Blanks, tabs, line ends and Unicode forms of a prompt are what was asked for; nothing is tidied."""
    prompt = "  a cafe\u0301,\n\ttwo chairs \u3000"
    made = read(f'prompt,name\n"{prompt}"," n\t"\n')
    assert made.requests[0].prompt == prompt
    assert made.values == [{"name": " n\t"}]


def test_duplicate_rows_are_kept(read: Any) -> None:
    """The same request twice is two rows, each with its own values: it is paid once and delivered twice."""
    made = read("name,prompt\na,x\nb,x\n")
    assert [value["name"] for value in made.values] == ["a", "b"]
    assert len({request.request_hash for request in made.requests}) == 1


def test_the_limit_takes_the_first_rows(read: Any, problems: Any) -> None:
    """limit counts rows, not lines, and leaves what follows them unread, good or bad."""
    data = 'prompt,n\na,1\n\n,\nb,2\nc,99\n"open\n'
    assert [request.prompt for request in read(data, limit=2).requests] == ["a", "b"]
    assert problems(data, limit=3) == [
        "line 6: n is 99 for dall-e-2; legal: 1 to 10",
        HINT.format("n="),
    ]
    assert len(problems(data)) == 3
    assert len(read("prompt\na\n", limit=10).requests) == 1
    for limit in (0, -1):
        with pytest.raises(PromptsError, match=f"limit must be at least 1, not {limit}"):
            read(data, limit=limit)


def test_all_problems_are_told_together(problems: Any) -> None:
    """Faults of the format, of characters and of fields are one list in the order of the file."""
    data = (
        b"prompt,model,size,n\n"
        b"x,dall-e-3,999x1,2\n"  # 2
        b",,,1\n"  # 3
        b'"a\nb" c,,,\n'  # 4
        b"x,y\n"  # 6
        b"caf\xe9,gpt-image-1,,\n"  # 7
        b"nul\x00,,,\n"  # 8
        b"x,dall-e-9,,\n"  # 9
        b"fine,,,\n"  # 10
        b"x,,,many\n"  # 11
    )
    assert problems(data) == [
        "line 2: n is 2 for dall-e-3; legal: 1",
        "line 2: size is '999x1' for dall-e-3; legal: auto, 1024x1024, 1792x1024, 1024x1792",
        "line 3: the prompt is blank: fill it in, or pass over such rows with --skip-blank",
        "line 4: a cell goes on after its closing quotation mark; inside a cell, write it twice",
        "line 6: its number of cells is 2, the header's is 4: quotation marks belong around a cell that holds what "
        "separates cells; in a file called .txt each line is a prompt",
        f"line 7: 'prompt' holds {UNDECODED}",
        "line 8: 'prompt' holds the control character U+0000: take it out or, if the file is UTF-16, say "
        "--encoding utf-16",
        "line 9: model is 'dall-e-9'; legal: gpt-image-2, gpt-image-1.5, gpt-image-1, dall-e-3, dall-e-2",
        "line 11: n is 'many' for dall-e-2; legal: 1 to 10",
        HINT.format("size=,n=,model="),
    ]


def test_many_problems_are_bounded(read: Any) -> None:
    """Twenty different problems are shown; the rest is counted, and none is lost from the count."""
    data = "prompt,size\n" + "".join(f"x,{number}x1\n" for number in range(500))
    with pytest.raises(PromptsError) as caught:
        read(data)
    summary, *lines = str(caught.value).split("\n")
    assert summary.endswith("can't be used: 500 problems")
    assert lines[19].startswith("  line 21: size is '19x1' for dall-e-2; ")
    assert lines[20:] == ["  and 480 more", f"  {HINT.format('size=')}"]


def test_one_problem_is_one() -> None:
    """A summary counts in words that fit, and the error survives a pickle."""
    with pytest.raises(PromptsError, match=r"limit") as caught:
        read_prompts("x.csv", limit=0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_long_prompt_is_not_repeated(problems: Any) -> None:
    """A prompt that is too long for its model is told by its length."""
    assert problems(f"prompt,model\n{'secret ' * 1000},dall-e-3\n") == [
        "line 2: prompt is 7,000 characters long for dall-e-3; legal: 1 to 4,000 characters, "
        "not all of them blank"
    ]


cells = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=15)


@given(st.lists(st.tuples(cells.filter(str.strip), cells, st.integers(1, 10)), min_size=1, max_size=8))
def test_any_table_of_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str, int]]
) -> None:
    """Any prompts and values that csv.writer writes are the requests and values that are read."""
    path = tmp_path_factory.mktemp("table") / "p.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("Prompt", "Name", "N"), *table])
    made = read_prompts(path)
    assert made.requests == [ImageRequest(prompt=prompt, n=n) for prompt, _, n in table]
    assert made.values == [{"name": name} for _, name, _ in table]


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from(
                [b"prompt", b"n", b",", b"\t", b"\n", b"\r", b'"', b"\xff", b"\x00", b"{", b"}", b":", b"1"]
            )
        ).map(b"".join),
    ),
    st.sampled_from([".csv", ".tsv", ".jsonl"]),
)
def test_hostile_bytes_are_judged_not_crashed_on(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, extension: str
) -> None:
    """No bytes raise anything but PromptsError, whose lines are printable."""
    path = tmp_path_factory.mktemp("bytes") / f"p{extension}"
    path.write_bytes(data)
    try:
        made = read_prompts(path)
    except PromptsError as error:
        printable = all(line.isprintable() for line in str(error).split("\n"))
    else:
        printable = len(made.requests) == len(made.values) > 0
    assert printable


def test_the_example_is_legal_and_varied() -> None:
    """The file that ships with the examples is good: several models, n=2, and one request under two names."""
    made = read_prompts(EXAMPLE)
    assert made.columns == ("name", "shot")
    assert len(made.requests) == 12
    assert len({request.request_hash for request in made.requests}) == 11
    assert {request.model for request in made.requests} == {
        "gpt-image-2",
        "gpt-image-1.5",
        "gpt-image-1",
        "dall-e-3",
        "dall-e-2",
    }
    assert len({value["name"] for value in made.values}) == 12
