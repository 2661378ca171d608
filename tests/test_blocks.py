from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import cloudpickle
import pytest
from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError

import prefect_ttapi
from prefect_ttapi import (
    Budget,
    ContentCredentialsSigner,
    ImageRequest,
    ImageStore,
    Price,
    Rendition,
    TTAPIClient,
    TTAPICredentials,
    UploadOptions,
)
from prefect_ttapi.tasks import encoded
from tests.support.certificates import chain_for

SECRET = "marked-secret-7f3a"
CHAIN = chain_for()
#: A line of the private key.
KEY_LINE = CHAIN.key.decode().splitlines()[1]
BLOCKS = [TTAPICredentials, ImageStore, ContentCredentialsSigner]


@pytest.mark.parametrize("block", BLOCKS)
class TestBlockStandards(BlockStandardTestSuite):
    """The standards that Prefect's own integrations are held to."""

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """There is no logo, since none has a public address; Prefect's own test would download it."""
        assert block._logo_url is None

    def test_has_a_documentation_url(self, block: type[Block]) -> None:
        """There is no "View docs", since our own pages have no public address."""
        assert block._documentation_url is None


def secretive() -> list[Block]:
    return [
        TTAPICredentials(api_key=SECRET),
        ImageStore(
            url="s3://bucket/prefix", access_key_id="AKID", secret_access_key=SECRET, session_token=SECRET
        ),
        ContentCredentialsSigner(certificates=CHAIN.pem.decode(), private_key=CHAIN.key.decode()),
    ]


@pytest.mark.parametrize("block", secretive(), ids=lambda block: type(block).__name__)
def test_no_secret_is_shown(block: Block):
    """No secret in repr, str, JSON or a dump of the fields."""
    for shown in (repr(block), str(block), f"{block}", block.model_dump_json(), repr(block.model_dump())):
        assert SECRET not in shown
        assert KEY_LINE not in shown


def test_clients_keep_the_key_to_themselves():
    """A client shows no key and can't be pickled; the block's pickle is what task runners send to their workers."""
    with TTAPICredentials(api_key=SECRET).get_client() as client:
        assert SECRET not in repr(client) + str(client)
        with pytest.raises(TypeError):
            pickle.dumps(client)
        with pytest.raises(TypeError):
            cloudpickle.dumps(client)


def test_blocks_are_registered_by_the_module():
    """`prefect block register -m prefect_ttapi` finds all blocks."""
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


@pytest.mark.usefixtures("prefect_server")
def test_a_block_that_another_version_saved_is_loaded(caplog: pytest.LogCaptureFixture):
    """A key of its document that this version does not know, at any depth, is one warning, and no error."""
    ImageStore(url="s3://pictures", upload={"tags": {"a": "b"}}).save("of-yore", overwrite=True)
    with get_client(sync_client=True) as client:
        saved = client.read_block_document_by_name("of-yore", "ttapi-image-store")
        data = {
            "url": "s3://pictures",
            "endpoint": "https://x.example",
            "upload": {"multipart_above_mib": 64},
        }
        client.update_block_document(saved.id, BlockDocumentUpdate(data=data, merge_existing_data=True))
    loaded = ImageStore.load("of-yore")
    assert (loaded.url, loaded.endpoint_url) == ("s3://pictures", None)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("prefect_ttapi")]
    assert told == [
        "ImageStore: endpoint was saved by another version, and is passed over",
        "UploadOptions: multipart_above_mib was saved by another version, and is passed over",
    ]


@pytest.mark.parametrize("block", secretive(), ids=lambda block: type(block).__name__)
def test_what_prefect_adds_to_a_block_is_no_setting(block: Block, caplog: pytest.LogCaptureFixture):
    """The JSON of a block names its type and its document; made again from that, it warns of nothing."""
    secrets = {"include_secrets": True}
    saved = block.model_dump(context=secrets)
    assert saved["block_type_slug"] == type(block)._block_type_slug
    added = {"_block_document_id": str(uuid4()), "_block_document_name": "n", "_is_anonymous": False}
    for made in (type(block).model_validate(saved | added), type(block)(**saved, **added)):
        assert made.model_dump(context=secrets, include={*saved}) == saved
    assert not caplog.records


@pytest.mark.parametrize(
    ("form", "given", "says"),
    [
        (
            ImageStore,
            {"url": "s3://b", "endpoint": "x"},
            "is no setting of ImageStore: did you mean endpoint_url?",
        ),
        (
            ImageStore,
            {"url": "s3://b", "upload": {"tag": {}}},
            "is no setting of UploadOptions: did you mean tags?",
        ),
        (ImageStore, {"url": "s3://b", "connection": {"verify": 0}}, "did you mean verify_tls?"),
        (TTAPICredentials, {"apikey": SECRET}, "is no setting of TTAPICredentials: did you mean api_key?"),
        (TTAPICredentials, {"api_key": SECRET, "zzz": 1}, "legal: api_key, base_url, "),
        (Budget, {"image": 3}, "is no setting of Budget: did you mean images?"),
        (Price, {"per_imag": 3}, "is no setting of Price: did you mean per_image?"),
        (Rendition, {"maxsize": 3}, "is no setting of Rendition: did you mean max_size?"),
        (
            ImageRequest,
            {"prompt": "x", "sise": "auto"},
            "is no field of an image request; did you mean size?",
        ),
    ],
)
def test_a_misspelt_setting_is_told_the_nearest_name(
    form: type[BaseModel], given: dict[str, object], says: str
):
    """It would else be passed over in silence; its value is not repeated, which may be a key."""
    with pytest.raises(ValidationError) as caught:
        form(**given)
    assert says in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(caught.value.errors())


def test_all_that_is_wrong_is_told_at_once():
    """A misspelt name hides no other error."""
    with pytest.raises(ValidationError) as caught:
        ImageStore(url="ftp://x", regoin="eu", patience=-1)
    assert {problem["loc"] for problem in caught.value.errors()} == {("url",), ("regoin",), ("patience",)}


@pytest.mark.parametrize("block", secretive(), ids=lambda block: type(block).__name__)
def test_prefects_json_of_a_block_with_secrets_needs_a_saved_one(block: Block):
    """Parameters of background tasks are JSON, in which a block that is not saved would be useless."""
    with pytest.raises(ValueError, match=r"nothing is sent: .*save the block") as refused:
        encoded(block)
    assert SECRET not in str(refused.value)
    assert encoded(ImageStore(url="/srv/pictures"))["data"]["url"] == "/srv/pictures"


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("block", "changes"),
    list(
        zip(
            secretive(),
            [
                {"base_url": "https://api.ttapi.org", "read_timeout": 9.0, "api_key": SecretStr("other")},
                {"url": "s3://elsewhere", "upload": UploadOptions(acl="private"), "secret_access_key": None},
                {"algorithm": "es256", "private_key": SecretStr("other")},
            ],
            strict=True,
        )
    ),
    ids=lambda given: type(given).__name__,
)
def test_prefects_json_refers_to_a_saved_block_only_if_it_was_not_changed(
    block: Block, changes: dict[str, object]
):
    """Whoever loads it would else work with what was saved: another store, or another account, than was asked for."""
    block.save("unchanged", overwrite=True)
    loaded = type(block).load("unchanged")
    for saved in (block, loaded):
        assert "**********" in str(encoded(saved))
        for field, value in changes.items():
            with pytest.raises(
                ValueError, match=rf"/unchanged has another {field} than is saved .*save the block first"
            ) as refused:
                encoded(saved.model_copy(update={field: value}))
            assert SECRET not in str(refused.value)
    field, value = next(iter(changes.items()))
    loaded.model_copy(update={field: value}).save("unchanged", overwrite=True)  # by somebody else
    with pytest.raises(ValueError, match=f"has another {field} than is saved"):
        encoded(loaded)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("block", "changed", "renewed"),
    list(
        zip(
            secretive(),
            [
                {"base_url": "https://api.ttapi.org"},
                {"url": "s3://elsewhere"},
                {"algorithm": "es256"},
            ],
            [{}, {"access_key_id": "AKIARENEWED"}, {"certificates": CHAIN.own.decode()}],
            strict=True,
        )
    ),
    ids=lambda given: type(given).__name__,
)
def test_prefects_json_of_a_saved_block_is_that_block_or_refused(
    block: Block, changed: dict[str, object], renewed: dict[str, object]
):
    """A run that is given a changed block must not work with the saved one; renewed keys may be used."""
    block.save("sent", overwrite=True)
    reader, sent = TypeAdapter(type(block)), encoded(block)["data"]
    assert reader.validate_python(sent) == type(block).load("sent")
    assert reader.validate_python(sent | renewed) == type(block).load("sent")
    with pytest.raises(ValidationError, match=rf"/sent has another {next(iter(changed))} than is saved"):
        reader.validate_python(sent | changed)


@pytest.mark.parametrize("asterisks", ["*", "**********", " *** "])
def test_asterisks_are_no_key(asterisks: str, monkeypatch: pytest.MonkeyPatch):
    """Where Prefect's JSON hid a secret, the error says what happened and what to do, before anything is sent."""
    monkeypatch.setenv("TTAPI_API_KEY", asterisks)
    keys = {"url": "s3://b", "access_key_id": "AKID", "secret_access_key": SECRET}
    makers: list[Callable[[], object]] = [
        lambda: TTAPICredentials(api_key=asterisks),
        TTAPICredentials.from_env,
        lambda: TTAPICredentials.model_validate_json(TTAPICredentials(api_key=SECRET).model_dump_json()),
        lambda: TTAPIClient(asterisks),
        lambda: ImageStore(**keys | {"secret_access_key": asterisks}),
        lambda: ImageStore(**keys, session_token=asterisks),
    ]
    for make in makers:
        with pytest.raises(
            ValueError, match=r"asterisks is what Prefect's JSON makes of a secret.* save the block"
        ):
            make()


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


def test_a_signer_may_be_in_files(tmp_path: Path):
    """A block with the paths of its files, as text or as paths, signs as one that has their contents."""
    (tmp_path / "chain.pem").write_bytes(CHAIN.pem)
    (tmp_path / "key.pem").write_bytes(CHAIN.key)
    block = ContentCredentialsSigner(
        certificates=tmp_path / "chain.pem", private_key_file=str(tmp_path / "key.pem")
    )
    inline = ContentCredentialsSigner(certificates=CHAIN.pem.decode(), private_key=CHAIN.key.decode())
    assert block.get_signer().identity == inline.get_signer().identity
    assert KEY_LINE.encode() not in pickle.dumps(block)
    block.get_signer().check()
    one_line = CHAIN.key.decode().replace("\n", " ")  # as a form's field makes of it
    ContentCredentialsSigner(certificates=CHAIN.pem.decode(), private_key=one_line).get_signer().check()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give either private_key or private_key_file"),
        ({"private_key": KEY_LINE, "private_key_file": "key.pem"}, "give either private_key or"),
        ({"private_key_file": "no-such-key.pem"}, "the file of private_key_file can't be read: No such file"),
        ({"private_key_file": KEY_LINE}, "the file of private_key_file can't be read: No such file"),
        ({"private_key_file": CHAIN.key.decode()}, "private_key_file holds the key itself"),
        ({"private_key": "***"}, "nothing but asterisks"),
        ({"private_key": KEY_LINE}, "the private key can't be read: it must be PEM"),
        ({"certificates": "no-such-chain.pem"}, "no-such-chain.pem can't be read: No such file"),
        ({"certificates": CHAIN.key.decode()}, "certificates hold a private key: give it as private_key"),
        ({"private_key": chain_for().key.decode()}, "does not belong to the certificate of Acme shop"),
        ({"certificates": chain_for(seconds=(-9, -5)).pem.decode()}, "the private key does not belong"),
        ({"algorithm": "md5"}, "Input should be 'es256'"),
        ({"algorithm": "ps256"}, "ps256 does not go with"),
        ({"time_stamp_url": "ftp://example.com"}, "is no address like https://example.com"),
        ({"private_kee": KEY_LINE}, "did you mean private_key?"),
    ],
)
def test_a_signer_that_cannot_sign_is_refused_at_once(given: dict[str, object], says: str):
    """Each with what is wrong; nothing of the key is in the error, wherever it was given."""
    key = (
        {"private_key": CHAIN.key.decode()}
        if given.keys() & {"certificates", "algorithm", "time_stamp_url"}
        else {}
    )
    with pytest.raises(ValidationError) as caught:
        ContentCredentialsSigner(**{"certificates": CHAIN.pem.decode()} | key | given)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value.errors())
    assert says in told
    assert not any(line in told for line in CHAIN.key.decode().splitlines()[1:-1])


def test_a_signer_for_testing_can_sign():
    """Its certificate is made anew each time."""
    signers = [ContentCredentialsSigner.for_testing("Zoë's shop").get_signer() for _ in range(2)]
    for signer in signers:
        signer.check()
    assert signers[0].name == "Zoë's shop"


@pytest.mark.parametrize("block", BLOCKS)
def test_the_form_is_plain(block: type[Block]):
    """Each field has one kind and a sentence; nothing is "or null", which the UI makes tabs of, nor a docstring."""
    schema = block.model_json_schema()
    boxes = schema.get("definitions", {})
    fields = [field for form in (schema, *boxes.values()) for field in form["properties"].values()]
    for field in fields:
        title = field.get("title") or boxes[field["$ref"].rpartition("/")[2]]["title"]
        assert " " in title or title[0].isupper()
        assert field["description"][0].isupper() or field["description"].startswith("https")
        assert field["description"].endswith(".")
        assert field.keys() & {"type", "$ref"}
        assert "anyOf" not in field
        assert field.get("default", "none") is not None
    assert not {"ConnectionOptions", "UploadOptions"} & {box["title"] for box in boxes.values()}
    assert not any("description" in box for box in boxes.values())
    assert ">>>" not in f"{schema} {block.get_description()} {block.get_code_example()}"


def test_the_store_is_asked_for_in_three_groups():
    """First where it is, then how it is reached, then how objects are written."""
    names = list(ImageStore.model_fields)
    marks = ["url", "endpoint_url", "connection", "cache_control", "upload", "patience"]
    assert [name for name in names if name in marks] == marks
