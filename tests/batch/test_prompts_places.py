"""Where prompts files are: local files, folders that are none, S3, and files too large or empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefect_ttapi.batch.prompts import LARGEST_FILE, MOST_ROWS, read_prompts
from prefect_ttapi.errors import PromptsError
from prefect_ttapi.requests import ImageRequest
from tests.support.s3 import S3Server

KINDS = ".csv, .tsv, .tab, .txt, .json, .jsonl, .ndjson, .xlsx, .xlsm, .parquet: save anything else as one of these"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.csv", b"", "is empty"),
        ("mark.tsv", b"\xef\xbb\xbf", "is empty"),
        ("blank.jsonl", b" \r\n\n", "is empty"),
        ("header.csv", b"prompt,n\n", "has no rows: it needs one for each request"),
        ("header.csv", b"prompt,n\n,\n\n", "has no rows: it needs one for each request"),
        ("notes.md", b"x", f"must end in one of {KINDS}"),
        ("prompts", b"x", f"must end in one of {KINDS}"),
        ("prompts.xls", b"x", f"must end in one of {KINDS}"),
        ("prompts.csv.gz", b"x", f"must end in one of {KINDS}"),
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
    most = "the most is 250,000 rows, 1,000 columns and 268,435,456 characters"
    assert (
        problems("prompt\tn\n" + "x\n" * (MOST_ROWS + 1), "p.tsv")[-1]
        == f"line {MOST_ROWS + 2}: is too much: {most}"
    )
    wide = ",".join(["prompt", *(f"c{number}" for number in range(1001))])
    assert problems(f"{wide}\n{wide}\n") == ["line 1: has 1,002 columns; the most is 1,000: leave out some"]
    many = "".join(f'{{"prompt": "x", "c{number}": 1}}\n' for number in range(2000))
    assert problems(many, "p.jsonl") == [f"line 1002: is too much: {most}"]


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket that the environment leads to, as AWS's tools are told."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_access_key)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return s3_server.new_bucket()


def test_prompts_on_s3(bucket: str, s3_server: S3Server) -> None:
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
