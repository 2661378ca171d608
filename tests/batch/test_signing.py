"""Batches that sign what they deliver, from images of the sandbox that have credentials themselves."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_ttapi import (
    ContentCredentialsSigner,
    ImageStore,
    Provenance,
    SigningError,
    TTAPICredentials,
    generate_batch,
)
from prefect_ttapi.images.signing import read_signature
from prefect_ttapi.sandbox import Sandbox
from tests.support.certificates import chain_for
from tests.support.database import marked_text_in_the_database

pytestmark = pytest.mark.usefixtures("prefect_server")

REQUESTS = [{"prompt": f"tree {number}", "model": "gpt-image-1"} for number in range(3)]
BY_SANDBOX = (
    "signed by prefect-ttapi sandbox, for testing only, with prefect-ttapi; "
    "valid, but nobody vouches for that name"
)


def test_a_batch_signs_what_it_delivers_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows and gallery tell who signed the images; copies build on them; a key that fails costs deliveries only."""
    chain = chain_for()
    key_file = tmp_path / "key.pem"
    key_file.write_bytes(chain.key)
    block = ContentCredentialsSigner(certificates=chain.pem.decode(), private_key_file=key_file)
    inline = ContentCredentialsSigner(certificates=chain.pem.decode(), private_key=chain.key.decode())
    store, shop = ImageStore(url=tmp_path / "images"), ImageStore(url=tmp_path / "shop")
    options = {"key": "{slug}.{ext}", "name": "signed", "provenance": Provenance(sign=block)}

    def until_the_key_is_gone() -> Iterator[dict[str, str]]:
        key_file.unlink()
        yield from REQUESTS

    with Sandbox(tiny=True, content_credentials=True) as sandbox:
        credentials = TTAPICredentials(api_key="sandbox", base_url=sandbox.base_url)
        failed = generate_batch(
            until_the_key_is_gone(), credentials, store, shop, raise_on_failure=False, **options
        )
        assert [(row.status, row.error_type, len(row.images)) for row in failed.rows] == [
            ("failed", "SigningError", 1)
        ] * 3
        assert all(
            "the file of private_key_file can't be read: No such file" in str(row.error)
            for row in failed.rows
        )
        assert not list(shop.list("tree"))
        assert "not foreseen" not in caplog.text
        with pytest.raises(SigningError, match="the file of private_key_file can't be read"):
            generate_batch([{"prompt": "another tree"}], credentials, store, shop, **options)
        assert (sandbox.calls, sandbox.paid) == (3, 3)

        options["provenance"] = {"sign": inline}
        report = generate_batch(REQUESTS, credentials, store, shop, **options)
        again = generate_batch(REQUESTS, credentials, store, shop, **options)
        assert sandbox.calls == 3
    for row in report.rows:
        assert [image.signature for image in row.images] == [BY_SANDBOX]
        (copy,) = row.delivered
        assert copy.signer == inline.get_signer().identity
        with shop.open(copy.uri) as file:
            signature = read_signature(file, "image/png")
        assert signature is not None
        assert (signature.problem, signature.signed_by) == (None, "Acme shop")
        assert signature.source_sha256 == row.images[0].sha256
    assert [row.delivered for row in again.rows] == [row.delivered for row in report.rows]
    assert BY_SANDBOX in Path(str(report.gallery_uri).removeprefix("file://")).read_text(encoding="utf-8")

    body = chain.key.decode().splitlines()[1]
    assert not [line for line in caplog.messages if body in line]
    assert body not in report.model_dump_json() + str(list(report.rows)) + repr(options)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and body.encode() in path.read_bytes()]
    assert marked_text_in_the_database((body,)) == []


def test_the_key_is_in_no_error_of_a_batch(store: ImageStore, credentials: TTAPICredentials) -> None:
    """Where an option is illegal, the others are not told."""
    block = ContentCredentialsSigner.for_testing()
    assert block.private_key is not None
    body = block.private_key.get_secret_value().splitlines()[1]
    with pytest.raises(ValueError, match="nothing was sent") as caught:
        generate_batch(REQUESTS, credentials, store, store, provenance={"sign": block, "mark": "promt"})
    with pytest.raises(ValueError, match=r"sign\.private_key") as other:
        Provenance(sign={"certificates": "chain.pem", "private_key": [body]})
    assert body not in "".join(traceback.format_exception(other.value))
    assert body not in "".join(traceback.format_exception(caught.value))
