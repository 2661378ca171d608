"""Options of uploads and connections: what is refused before anything is paid for, and what a header says."""

from __future__ import annotations

import re
from email.message import Message
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefect_ttapi.storage.settings import UploadOptions
from prefect_ttapi.storage.store import ImageStore


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"upload": {"tags": {str(n): "x" for n in range(11)}}}, "at most 10 tags, not 11"),
        ({"upload": {"tags": {"": "x"}}}, "1 to 128 characters"),
        ({"upload": {"tags": {"k" * 129: "x"}}}, "1 to 128 characters"),
        ({"upload": {"tags": {"k": "v" * 257}}}, "at most 256 characters"),
        ({"upload": {"tags": {"AWS:owner": "me"}}}, "AWS's own"),
        ({"upload": {"tags": {"k": "a&b"}}}, "letters, digits, spaces"),
        ({"upload": {"tags": {"k": "a\nb"}}}, "letters, digits, spaces"),
        ({"upload": {"storage_class": "GLACIER"}}, "use GLACIER_IR"),
        ({"upload": {"storage_class": "standard"}}, "is no storage class"),
        ({"upload": {"kms_key_id": "alias/x"}}, "goes with encryption='aws:kms'"),
        ({"upload": {"encryption": "aws:kms", "kms_key_id": "a\r\nb: c"}}, "no HTTP header"),
        ({"upload": {"acl": "public-read-write"}}, "acl"),
        ({"upload": {"storageclass": "STANDARD_IA"}}, "storageclass"),
        ({"connection": {"addressing_style": "dns"}}, "addressing_style"),
        ({"connection": {"ca_file": "ca.pem", "verify_tls": False}}, "leave out one of them"),
        ({"aws_credentials": "prod"}, "give aws-credentials/NAME"),
        ({"aws_credentials": 3}, "give aws-credentials/NAME"),
        (
            {"aws_credentials": "aws-credentials/a", "access_key_id": "k", "secret_access_key": "s"},
            "aws_credentials or keys",
        ),
    ],
)
def test_illegal_options_are_explained(options: dict, why: str) -> None:
    """An option that the service would refuse, or that makes no sense, is refused with what is wrong."""
    with pytest.raises(ValidationError, match=re.escape(why)):
        ImageStore(url="s3://pictures", **options)


def test_legal_options_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags in any script at their limits, and a CA file that a later change of directory doesn't move."""
    monkeypatch.chdir(tmp_path)
    tags = {"größe" + "k" * 123: "値 " + "v" * 254, "_.:/=+-@": ""}
    store = ImageStore(url="s3://pictures", upload={"tags": tags}, connection={"ca_file": "ca.pem"})
    again = ImageStore.model_validate_json(store.model_dump_json())
    assert again.upload.tags == tags
    assert again.connection.verify == str(tmp_path / "ca.pem")
    assert again.connection.addressing_style == "auto"


@given(st.text(min_size=1, max_size=40).filter(lambda name: "/" not in name and name.isprintable()))
def test_a_file_name_survives_the_header(name: str) -> None:
    """Any name comes out of the header as it was, by the rules that browsers follow, and nothing else does."""
    header = UploadOptions(content_disposition="attachment").disposition(f"2031/{name}")
    assert header.isascii()
    assert header.isprintable()
    read = Message()
    read["Content-Disposition"] = header
    assert read.get_content_disposition() == "attachment"
    plain = re.fullmatch(r'attachment; filename="([^"\\]*)"(?:; filename\*=UTF-8\'\'([^" ]+))?', header)
    assert (unquote(plain[2], errors="strict") if plain[2] else plain[1]) == name
    assert UploadOptions().disposition(name) is None


def test_blocks_of_earlier_versions_are_read() -> None:
    """A block that was saved when images went in parts above a size of its own still opens."""
    saved = {"url": "s3://pictures", "upload": {"multipart_above_mib": 64, "tags": {"a": "b"}}}
    assert ImageStore.model_validate(saved).upload == UploadOptions(tags={"a": "b"})
