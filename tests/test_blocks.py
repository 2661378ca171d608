from __future__ import annotations

import json
import pickle
import traceback

import cloudpickle
import pytest
from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import ValidationError

import prefect_ttapi
from prefect_ttapi import ImageStore, TTAPICredentials

SECRET = "marked-secret-7f3a"
BLOCKS = [TTAPICredentials, ImageStore]


@pytest.mark.parametrize("block", BLOCKS)
class TestBlockStandards(BlockStandardTestSuite):
    """The standards that Prefect's own integrations are held to."""

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """There is no logo, since none has a public address; Prefect's own test would download it."""
        assert block._logo_url is None


def secretive() -> list[Block]:
    return [
        TTAPICredentials(api_key=SECRET),
        ImageStore(
            url="s3://bucket/prefix", access_key_id="AKID", secret_access_key=SECRET, session_token=SECRET
        ),
    ]


@pytest.mark.parametrize("block", secretive(), ids=lambda block: type(block).__name__)
def test_no_secret_is_shown(block: Block):
    """No secret in repr, str, JSON or a dump of the fields."""
    for shown in (repr(block), str(block), f"{block}", block.model_dump_json(), repr(block.model_dump())):
        assert SECRET not in shown


def test_clients_keep_the_key_to_themselves():
    """A client shows no key and can't be pickled; the block's pickle is what task runners send to their workers."""
    with TTAPICredentials(api_key=SECRET).get_client() as client:
        assert SECRET not in repr(client) + str(client)
        with pytest.raises(TypeError):
            pickle.dumps(client)
        with pytest.raises(TypeError):
            cloudpickle.dumps(client)


def test_blocks_are_registered_by_the_module():
    """`prefect block register -m prefect_ttapi` finds both blocks."""
    found = {
        value
        for value in vars(prefect_ttapi).values()
        if isinstance(value, type) and issubclass(value, Block)
    }
    assert found == set(BLOCKS)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("block", BLOCKS)
def test_capabilities(block: type[Block]):
    """The server knows each block by the capabilities of its class; credentials are a CredentialsBlock."""
    block.register_type_and_schema()
    with get_client(sync_client=True) as client:
        schema = client.read_block_schema_by_checksum(block._calculate_schema_checksum())
    assert set(schema.capabilities) == block.get_block_capabilities()
    assert issubclass(TTAPICredentials, CredentialsBlock)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("block", secretive(), ids=lambda block: type(block).__name__)
def test_saved_blocks_come_back(block: Block):
    """Saved and loaded again, a block has its secrets; the block document's schema hides them in the UI."""
    block.save("round-trip", overwrite=True)
    loaded = type(block).load("round-trip")
    assert loaded == block
    secrets = type(block)._calculate_schema_checksum and type(block).model_json_schema()["secret_fields"]
    assert secrets


@pytest.mark.parametrize(
    "base_url",
    ["http://api.ttapi.io", "ftp://api.ttapi.io", "https://user:pass@api.ttapi.io", "", "api.ttapi.io"],
)
def test_unsafe_addresses_are_refused(base_url: str):
    """The key never crosses a network in the clear: http is for this machine only; the error has no key."""
    with pytest.raises(ValidationError) as caught:
        TTAPICredentials(api_key=SECRET, base_url=base_url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", ["", "   ", "clé", "two\nlines"])
def test_malformed_keys_are_refused(key: str):
    """A key that can't be one is refused, and not repeated in the error."""
    with pytest.raises(ValidationError) as caught:
        TTAPICredentials(api_key=key)
    assert "input_value" not in str(caught.value)


def test_from_env(monkeypatch: pytest.MonkeyPatch):
    """TTAPI_API_KEY and TTAPI_BASE_URL make credentials; without a key the error says what to set."""
    monkeypatch.setenv("TTAPI_API_KEY", SECRET)
    monkeypatch.setenv("TTAPI_BASE_URL", "https://api.ttapi.org/")
    credentials = TTAPICredentials.from_env()
    assert credentials.base_url == "https://api.ttapi.org"
    assert credentials.api_origin == "https://api.ttapi.io"
    monkeypatch.delenv("TTAPI_API_KEY")
    with pytest.raises(ValueError, match="TTAPI_API_KEY is not set"):
        TTAPICredentials.from_env()


def test_form_fields_make_sense():
    """Every field has a title and a description for the UI's form."""
    for block in BLOCKS:
        for name, field in block.model_json_schema()["properties"].items():
            assert field.get("title"), name
            assert field.get("description"), name
            json.dumps(field)
