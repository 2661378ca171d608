"""What columns mean: fields, values under names that fit key templates, and what is refused or warned of."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import NAMES, Keys, KeyTemplate, plain_name


def test_a_missing_prompt_column_names_the_columns(problems: Any) -> None:
    """Without a column for the prompts, the columns there are and the way out are told."""
    (line,) = problems("Text,Size\nx,1\ny,1\n")
    assert line == (
        "line 1: no column is named 'prompt'; columns: 'Text', 'Size'. "
        "Name the one that holds the prompts: --prompt-column, or prompt_column="
    )
    (line,) = problems("prompt,n\nx,1\n", prompt_column="Txt")
    assert line.startswith("line 1: no column is named 'Txt'; columns: 'prompt', 'n'.")
    (line,) = problems('{"text": 1}\n{"prompt": "x"}\n{"text": 2}\n', "p.jsonl")
    assert line.startswith("lines 1 and 3: no column is named 'prompt'; columns: 'text'.")
    (line,) = problems("{}\n", "p.jsonl")
    assert "columns: none" in line


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("Prompt,prompt,n", "columns 'Prompt' and 'prompt' are both prompt: rename one of them"),
        ("prompt,size, SIZE", "columns 'size' and ' SIZE' are both size: rename one of them"),
        (
            "prompt,Output Format,output-format",
            "columns 'Output Format' and 'output-format' are both output_format: rename one of them",
        ),
        (
            "prompt,Product ID,product_id",
            "columns 'Product ID' and 'product_id' are both product_id: rename one of them",
        ),
        ("prompt,ok,na\x01me", "the name 'na\\x01me' holds the control character U+0001: take it out there"),
        (
            "prompt,ok,\udce9",
            "the name '\\udce9' holds something that is no text in UTF-8, or in the encoding given: save the file as "
            "UTF-8, or name its encoding, e.g. --encoding windows-1252",
        ),
    ],
)
def test_names_that_clash_or_can_not_be_read(problems: Any, header: str, problem: str) -> None:
    """Two columns for one thing, and names that are no text, are told once, at the header's line."""
    assert problems(f"{header}\na,b,c\nd,e,f\n".encode(errors="surrogateescape")) == [f"line 1: {problem}"]


def test_a_json_name_twice_is_a_clash(problems: Any) -> None:
    """In JSON Lines, a name that occurs twice in an object is refused rather than half read."""
    assert problems('{"prompt": "x", "n": 1, "n": 2}\n', "p.jsonl") == [
        "line 1: columns 'n' and 'n' are both n: rename one of them"
    ]


def test_columns_without_a_name_may_only_be_empty(read: Any, problems: Any) -> None:
    """A spreadsheet's empty columns at the end do no harm; a cell without a name is a cell out of place."""
    assert read("prompt,n,,\nx,2,,\ny,, ,\n").columns == ()
    (line,) = problems("prompt,\nan unquoted, comma\n")
    assert line.startswith(
        "line 2: has a cell in column 2, which has no name of letters or digits: give it one"
    )


@pytest.mark.parametrize("header", [",prompt", '"",prompt', "#,prompt"])
def test_row_numbers_in_a_first_column_without_a_name_are_left_out(read: Any, header: str) -> None:
    """The index that pandas and R write, and a column called #, do no harm; that it is left out is said."""
    made = read(f"{header}\n0,x\n1,y\n")
    assert [request.prompt for request in made.requests] == ["x", "y"]
    assert made.columns == ()
    assert made.notes == ("the first column has no name: it is taken for row numbers, and left out",)


def test_a_misspelt_column_is_a_value_and_a_warning(read: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A column that was probably meant as a field is kept as a value, and the log names the field."""
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        made = read("prompt,modle,sise,sku,title,category\nx,dall-e-3,1x1,7,t,c\n")
    assert made.columns == ("modle", "sise", "sku", "title", "category")
    assert made.requests == [ImageRequest(prompt="x")]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].endswith("column 'modle': it is a value for the key template; did you mean model?")
    assert said[1].endswith("column 'sise': it is a value for the key template; did you mean size?")


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("Product ID", "product_id"),
        ("  product--id ", "product_id"),
        ("_sku_", "sku"),
        ("Größe (cm)", "größe_cm"),
        ("Gro\u0308ße", "größe"),
        ("価格", "価格"),
        ("ＳＫＵ", "sku"),
        ("a\nb", "a_b"),
        ("2nd line", "_2nd_line"),
        ("x²", "x2"),
        ("৴", ""),
        ("İl", "i\u0307l"),
        ("#", ""),
        ("", ""),
    ],
)
def test_names_for_templates(written: str, plain: str) -> None:
    """A column's name in templates is lower case, with _ for what is neither letter nor digit."""
    assert plain_name(written) == plain
    assert plain_name(plain) == plain


@given(st.text(max_size=20))
def test_any_name_becomes_an_identifier_or_nothing(written: str) -> None:
    """Whatever a column is called, its plain name can stand in a template, and is plain already."""
    plain = plain_name(written)
    assert plain == "" or plain.isidentifier()
    assert plain_name(plain) == plain
    if plain and plain not in NAMES:
        template = KeyTemplate(f"{{{plain}}}.{{ext}}", [plain])
        keys = Keys(template, ImageRequest(prompt="x"), datetime(2031, 5, 4, tzinfo=UTC), {plain: "v"})
        assert keys.planned() == ["v.webp"]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ImageRequest.model_fields)))
def test_columns_that_templates_do_not_see(read: Any, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """A column whose name means something else in key templates is warned of; one that is used is not."""
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        made = read(f"{name},prompt\nmine,x\n")
    template = KeyTemplate(f"{{{name}}}", [name])
    (key,) = Keys(template, made.requests[0], datetime(2031, 5, 4, tzinfo=UTC), made.values[0]).planned()
    assert (key != "mine") == any("is not this column" in record.getMessage() for record in caplog.records)


def test_json_rows_may_differ(read: Any) -> None:
    """In JSON Lines each row has the values it names; columns are all of them, in the file's order."""
    made = read('{"prompt": "x", "b": 1}\n{"a": true, "prompt": "y", "n": null}\n', "p.jsonl")
    assert made.values == [{"b": "1"}, {"a": "true"}]
    assert made.columns == ("b", "a")
