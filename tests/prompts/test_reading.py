"""Prompts files as requests: columns, defaults, values, and all problems of a file in one error."""

from __future__ import annotations

import csv
import logging
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.prompts import Prompts, PromptsError, read_prompts
from prefect_ttapi.prompts.columns import plain_name
from prefect_ttapi.prompts.reading import LARGEST_FILE, MOST_ROWS
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import NAMES, KeyTemplate
from tests.s3 import S3Server, s3_server  # noqa: F401 - a fixture

EXAMPLE = Path(__file__).parents[2] / "flows" / "prompts.csv"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Writes a file and reads it as prompts."""

    def write_and_read(data: str | bytes, name: str = "prompts.csv", **options: Any) -> Prompts:
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return read_prompts(path, **options)

    return write_and_read


@pytest.fixture
def problems(read: Any) -> Any:
    """The lines of the error that a file gives."""

    def of(data: str | bytes, name: str = "prompts.csv", **options: Any) -> list[str]:
        with pytest.raises(PromptsError) as caught:
            read(data, name, **options)
        summary, *lines = str(caught.value).split("\n")
        assert summary.startswith("'") and f"{name}' " in summary  # noqa: PT018
        return [line.strip() for line in lines]

    return of


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
    assert problems(data, limit=3) == ["line 6: n is 99 for dall-e-2; legal: 1 to 10"]
    assert len(problems(data)) == 2
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
        "line 3: prompt is '' for dall-e-2; legal: 1 to 1,000 characters, not all of them blank",
        "line 4: a cell goes on after its closing quotation mark; inside a cell, write it twice",
        "line 6: its number of cells is 2, the header's is 4",
        "line 7: 'prompt' holds something that is not UTF-8 text: save the file as UTF-8",
        "line 7: prompt is 'caf\\udce9' for gpt-image-1; it holds a lone surrogate, which is no "
        "character and can't be sent",
        "line 8: 'prompt' holds the control character U+0000",
        "line 9: model is 'dall-e-9'; legal: gpt-image-2, gpt-image-1.5, gpt-image-1, dall-e-3, dall-e-2",
        "line 11: n is 'many' for dall-e-2; legal: 1 to 10",
    ]


def test_many_problems_are_bounded(read: Any) -> None:
    """Twenty different problems are shown; the rest is counted, and none is lost from the count."""
    data = "prompt,size\n" + "".join(f"x,{number}x1\n" for number in range(500))
    with pytest.raises(PromptsError) as caught:
        read(data)
    summary, *lines = str(caught.value).split("\n")
    assert summary.endswith("can't be used: 500 problems")
    assert len(lines) == 21
    assert lines[19].startswith("  line 21: size is '19x1' for dall-e-2; ")
    assert lines[20] == "  and 480 more"


def test_one_problem_is_one() -> None:
    """A summary counts in words that fit, and the error survives a pickle."""
    with pytest.raises(PromptsError, match=r"limit") as caught:
        read_prompts("x.csv", limit=0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_a_long_prompt_is_not_repeated(problems: Any) -> None:
    """A prompt that is too long for its model is told by its length."""
    assert problems(f"prompt,model\n{'secret ' * 1000},dall-e-3\n") == [
        "line 2: prompt is 7,000 characters long for dall-e-3; legal: 1 to 4,000 characters, "
        "not all of them blank"
    ]


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
        ("Prompt,prompt,n", "columns 'Prompt' and 'prompt' are both prompt"),
        ("prompt,size, SIZE", "columns 'size' and ' SIZE' are both size"),
        (
            "prompt,Output Format,output-format",
            "columns 'Output Format' and 'output-format' are both output_format",
        ),
        ("prompt,Product ID,product_id", "columns 'Product ID' and 'product_id' are both product_id"),
        ("prompt,ok,na\x01me", "the name 'na\\x01me' holds the control character U+0001"),
        (
            "prompt,ok,\udce9",
            "the name '\\udce9' holds something that is not UTF-8 text: save the file as UTF-8",
        ),
    ],
)
def test_names_that_clash_or_can_not_be_read(problems: Any, header: str, problem: str) -> None:
    """Two columns for one thing, and names that are no text, are told once, at the header's line."""
    assert problems(f"{header}\na,b,c\nd,e,f\n".encode(errors="surrogateescape")) == [f"line 1: {problem}"]


def test_a_json_name_twice_is_a_clash(problems: Any) -> None:
    """In JSON Lines, a name that occurs twice in an object is refused rather than half read."""
    assert problems('{"prompt": "x", "n": 1, "n": 2}\n', "p.jsonl") == [
        "line 1: columns 'n' and 'n' are both n"
    ]


def test_columns_without_a_name_may_only_be_empty(read: Any, problems: Any) -> None:
    """A spreadsheet's empty columns at the end do no harm; a cell without a name is a cell out of place."""
    assert read("prompt,n,,\nx,2,,\ny,, ,\n").columns == ()
    assert problems("prompt,\nan unquoted, comma\n") == [
        "line 2: has a cell in column 2, which has no name of letters or digits"
    ]
    assert problems("#,prompt\n1,x\n2,y\n") == [
        "lines 2 and 3: has a cell in column 1, which has no name of letters or digits"
    ]


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
        keys = template.planned_keys(
            ImageRequest(prompt="x"), {plain: "v"}, date=datetime(2031, 5, 4, tzinfo=UTC)
        )
        assert keys == ["v.webp"]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ImageRequest.model_fields)))
def test_columns_that_templates_do_not_see(read: Any, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """A column whose name means something else in key templates is warned of; one that is used is not."""
    with caplog.at_level(logging.WARNING, "prefect_ttapi"):
        made = read(f"{name},prompt\nmine,x\n")
    template = KeyTemplate(f"{{{name}}}", [name])
    (key,) = template.planned_keys(made.requests[0], made.values[0], date=datetime(2031, 5, 4, tzinfo=UTC))
    assert (key != "mine") == any("is not this column" in record.getMessage() for record in caplog.records)


def test_json_rows_may_differ(read: Any) -> None:
    """In JSON Lines each row has the values it names; columns are all of them, in the file's order."""
    made = read('{"prompt": "x", "b": 1}\n{"a": true, "prompt": "y", "n": null}\n', "p.jsonl")
    assert made.values == [{"b": "1"}, {"a": "true"}]
    assert made.columns == ("b", "a")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.csv", b"", "is empty"),
        ("mark.tsv", b"\xef\xbb\xbf", "is empty"),
        ("blank.jsonl", b" \r\n\n", "is empty"),
        ("header.csv", b"prompt,n\n", "has no rows: it needs one for each request"),
        ("header.csv", b"prompt,n\n,\n\n", "has no rows: it needs one for each request"),
        ("notes.txt", b"x", "must end in one of .csv, .tsv, .tab, .jsonl, .ndjson"),
        ("prompts", b"x", "must end in one of .csv, .tsv, .tab, .jsonl, .ndjson"),
        ("prompts.xlsx", b"PK", "must end in one of .csv, .tsv, .tab, .jsonl, .ndjson"),
        ("prompts.csv.gz", b"x", "must end in one of .csv, .tsv, .tab, .jsonl, .ndjson"),
    ],
)
def test_files_with_nothing_to_read(read: Any, name: str, data: bytes, says: str) -> None:
    """What holds no rows, or is of no kind that is known, is refused in one line."""
    with pytest.raises(PromptsError) as caught:
        read(data, name)
    assert str(caught.value).endswith(f"{name}' {says}")


def test_places_with_nothing_to_read(tmp_path: Path) -> None:
    """A missing file and a folder are told apart, also where the folder's name looks like a file's."""
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(PromptsError, match=r"folder\.csv' is a folder, not a file$"):
        read_prompts(tmp_path / "folder.csv")
    with pytest.raises(PromptsError, match=r"nothing\.csv' does not exist$"):
        read_prompts(tmp_path / "nothing.csv")
    with pytest.raises(PromptsError, match=r"can't be read: File name too long$"):
        read_prompts(tmp_path / f"{'x' * 300}.csv")


@pytest.mark.parametrize(
    "address",
    [
        "https://user:pw@example.com/p.csv?sig=Marked9",
        "http://example.com/p.csv",
        "ftp://h/p.csv",
        "gs://b/p.csv",
        "zip://p.csv::s3://bucket/p.zip",
        "file://other-host/p.csv",
        "s3://user:Marked9@bucket/p.csv",
        "s3://",
        "",
        "a\x00.csv",
    ],
)
def test_addresses_that_are_none_of_ours(address: str) -> None:
    """Only local files and S3 are read; what was given is not repeated, since it may hold a secret."""
    with pytest.raises(
        PromptsError, match=r"^prompts are read from a local file, file:///\.\.\. or s3://bucket/key$"
    ):
        read_prompts(address)


def test_file_urls(tmp_path: Path) -> None:
    """A file:// URL is read like the file it names, with its escapes."""
    path = tmp_path / "my prompts é.csv"
    path.write_text("prompt\nx\n", "utf-8")
    assert read_prompts(path.as_uri()).requests == [ImageRequest(prompt="x")]
    assert read_prompts(path.as_uri()).path == path.as_uri()


def test_a_file_too_large_is_refused(tmp_path: Path) -> None:
    """The bound on a file's size is looked at before its rows are."""
    path = tmp_path / "large.csv"
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(PromptsError, match=r"large\.csv' is larger than 256 MiB$"):
        read_prompts(path)


def test_too_many_rows_and_columns(problems: Any) -> None:
    """Rows and columns are bounded, in all formats, and the error says by how many."""
    most = "the most is 250,000 rows and 1,000 columns"
    assert (
        problems("prompt\tn\n" + "x\n" * (MOST_ROWS + 1), "p.tsv")[-1]
        == f"line {MOST_ROWS + 2}: is too much: {most}"
    )
    wide = ",".join(["prompt", *(f"c{number}" for number in range(1001))])
    assert problems(f"{wide}\n{wide}\n") == ["line 1: has 1,002 columns; the most is 1,000"]
    many = "".join(f'{{"prompt": "x", "c{number}": 1}}\n' for number in range(2000))
    assert problems(many, "p.jsonl") == [f"line 1002: is too much: {most}"]


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: F811
    """A bucket that the environment leads to, as AWS's tools are told."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_access_key)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return s3_server.new_bucket()


def test_prompts_on_s3(bucket: str, s3_server: S3Server) -> None:  # noqa: F811
    """A file in a bucket is read like a local one; what is missing there is told in one line."""
    client = s3_server.client()
    client.put_object(Bucket=bucket, Key="in/p é.tsv", Body=b'prompt\tsku\n"x" y\t7\n')
    client.close()
    made = read_prompts(f"s3://{bucket}/in/p é.tsv")
    assert made.requests == [ImageRequest(prompt='"x" y')]
    assert made.values == [{"sku": "7"}]
    for address, says in [
        (f"s3://{bucket}/in/none.csv", "does not exist"),
        (f"s3://{bucket}/in/p", "must end in one of"),
        ("s3://no-such-bucket-here/p.csv", "bucket"),
    ]:
        with pytest.raises(PromptsError, match=says) as caught:
            read_prompts(address)
        assert "\n" not in str(caught.value)


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
