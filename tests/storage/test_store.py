"""The block: what may be written into it, what it never shows, and what it does with images."""

from __future__ import annotations

import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.blocks.core import Block
from pydantic import ValidationError

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.storage import s3_service
from prefect_ttapi.storage.objects import MOST_METADATA, ascii_metadata, read_metadata
from prefect_ttapi.storage.s3 import S3
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import delivery_to, fresh_image, sha256, stored
from tests.support.meddling import meddling_proxy
from tests.support.pictures import manifest_store, png_of, with_credentials
from tests.support.s3 import S3Server

SECRETS = {"secret_access_key": "very-secret-key", "session_token": "very-secret-token"}


def secretive() -> ImageStore:
    return ImageStore(url="s3://pictures", access_key_id="AKIA", **SECRETS)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("pictures\nmore", "control characters"),
        ("gs://pictures", "is not understood; give a folder, file:///folder or s3://bucket/prefix"),
        ("s3:/bucket", "is not understood; give a folder, file:///folder or s3://bucket/prefix"),
        ("S3:bucket/art", "is not understood"),
        ("s3:///prefix", "names no bucket"),
        ("s3://", "names no bucket"),
        ("s3://key:secret@pictures", "takes no user, password or port"),
        ("s3://pictures?versionId=3", "takes no query or fragment"),
        ("s3://pictures/a#b", "takes no query or fragment"),
        ("s3://pic tures", "is no legal bucket name"),
        ("s3://pictures/a/../b", "has an empty, '.' or '..' segment"),
        ("s3://pictures//a", "has an empty, '.' or '..' segment"),
        ("file://server/share", "must look like file:///folder"),
    ],
)
def test_illegal_addresses_are_explained(url: str, why: str) -> None:
    """An address that is no place for images is refused with what is wrong."""
    with pytest.raises(ValidationError) as caught:
        ImageStore(url=url)
    assert why in str(caught.value)


def test_addresses_are_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders become absolute, so that a later change of directory changes nothing; slashes at the end go."""
    monkeypatch.chdir(tmp_path)
    assert ImageStore(url="out").url == str(tmp_path / "out")
    assert ImageStore(url=(tmp_path / "a b").as_uri()).url == str(tmp_path / "a b")
    assert ImageStore(url="s3://pictures/2031/").url == "s3://pictures/2031"
    again = ImageStore.model_validate_json(ImageStore(url="out").model_dump_json())
    assert again.identity == (tmp_path / "out").as_uri()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"access_key_id": "AKIA"}, "give both or neither"),
        ({"secret_access_key": "s"}, "give both or neither"),
        ({"endpoint_url": "minio.example.com"}, "is no address like https://example.com"),
        ({"endpoint_url": "https://user:pass@minio.example.com"}, "takes no user, password"),
        ({"public_base_url": "javascript:alert(1)"}, "is no address like"),
        ({"public_base_url": "https://cdn.example.com/?a=b"}, "takes no user, password, query"),
        ({"cache_control": "max-age=1\r\nX-Evil: 1"}, "no HTTP header"),
    ],
)
def test_illegal_settings_are_explained(fields: dict[str, str], why: str) -> None:
    """A setting that could not work, or would smuggle something in, is refused."""
    with pytest.raises(ValidationError) as caught:
        ImageStore(url="s3://pictures", **fields)
    assert why in str(caught.value)


def test_secrets_stay_inside() -> None:
    """Neither repr, str, JSON, identity nor the S3 settings' repr shows a secret."""
    store = secretive()
    shown = [repr(store), str(store), store.model_dump_json(), store.identity, repr(store._bucket())]
    assert not [text for text in shown for secret in SECRETS.values() if secret in text]
    with pytest.raises(ValidationError) as caught:
        ImageStore(url="s3://pictures", secret_access_key=SECRETS["secret_access_key"])
    assert SECRETS["secret_access_key"] not in str(caught.value)


def test_a_pickle_is_the_settings_only(store: ImageStore) -> None:
    """A block that has been used travels to a worker: its pickle holds no connection, and works there."""
    image = stored(store)
    data = pickle.dumps(store)
    assert b"botocore" not in data
    assert len(data) < 4000
    assert pickle.loads(data).read_bytes(image.uri) == b"pixels"


def test_it_is_a_good_block() -> None:
    """What Prefect shows and asks for: names, a description, a title and a description for each field."""
    assert Block.get_block_class_from_key("ttapi-image-store") is ImageStore
    assert ImageStore.get_description()
    assert 'ImageStore.load("BLOCK_NAME")' in ImageStore.get_code_example()
    schema = ImageStore.model_json_schema()
    assert all(field["description"] for field in schema["properties"].values())
    assert schema["secret_fields"] == ["secret_access_key", "session_token"]


def test_mapping_over_a_block_is_an_error() -> None:
    """`.map` iterates what it can; a store given to it by mistake must not be taken apart."""
    with pytest.raises(TypeError):
        iter(secretive())


def test_what_is_not_given_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS_REGION and the two endpoint variables count where the block says nothing, the S3 one first."""
    store = ImageStore(url="s3://pictures")
    for name in ("AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert (store._bucket().account.region, store._bucket().account.endpoint_url) == (None, None)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://all.example.com")
    assert store._bucket().account.region == "eu-central-1"
    assert store.identity == "s3://pictures at https://all.example.com"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example.com")
    assert store.identity == "s3://pictures at https://s3.example.com"
    own = ImageStore(url="s3://pictures", endpoint_url="https://own.example.com/", region="here")
    assert (own._bucket().account.region, own._bucket().account.endpoint_url) == (
        "here",
        "https://own.example.com",
    )


def test_spellings_of_a_folder_are_one_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity decides where rescued answers are; what is above a link is above the folder that it leads to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    spellings = ("art", "./art/", "x/../art", Path("art"), "~/art", Path("~/y/../art"), tmp_path / "art")
    stores = {ImageStore(url=spelling).identity for spelling in spellings}
    assert stores == {(tmp_path / "art").as_uri()}
    assert ImageStore(url="link/../art").url == str(tmp_path / "elsewhere" / "art")
    assert ImageStore(url="link/art").url == str(tmp_path / "link" / "art")


def test_the_identity_tells_stores_apart(tmp_path: Path) -> None:
    """Two stores with the same objects have one identity, whatever their secrets; others have others."""
    here = {"endpoint_url": "https://a.example.com"}
    same = [
        ImageStore(url="s3://pic/x", **here),
        ImageStore(url="s3://pic/x/", access_key_id="k", secret_access_key="s", **here),
    ]
    others = [
        ImageStore(url="s3://pic/y", **here),
        ImageStore(url="s3://pic/x", endpoint_url="https://b.example.com"),
        ImageStore(url=str(tmp_path)),
    ]
    assert len({store.identity for store in same}) == 1
    assert len({store.identity for store in [*same, *others]}) == 4


def test_images_are_kept_under_their_hash(store: ImageStore) -> None:
    """An image's key is its SHA-256 with the extension of its type; what is known of it stays with it."""
    image = store.put_image(fresh_image(b"pixels", "image/jpeg", index=3), {})
    assert image.uri == store.uri(f"images/{sha256(b'pixels')}.jpg")
    assert (image.size_bytes, image.index, image.width, image.height) == (6, 3, 64, 48)
    assert store.read_bytes(image.uri) == b"pixels"
    assert store.size(image.uri) == store.size(f"images/{image.sha256}.jpg") == 6
    with store.open(image.uri) as reader:
        assert (reader.read(3), reader.seek(0), reader.read()) == (b"pix", 0, b"pixels")


def test_an_image_comes_with_its_marks(folder_store: ImageStore) -> None:
    """What a file says of where it comes from is found in its bytes; of other kinds of files nothing is known."""
    signed = with_credentials(png_of(64, 48), manifest_store(3_000))
    assert stored(folder_store, signed).marks == ("credentials",)
    assert stored(folder_store, png_of(64, 48)).marks == ()
    assert stored(folder_store, b"GIF89a and so on").marks is None


def test_an_image_is_one_upload(s3_server: S3Server) -> None:
    """Keeping an image is one request, no look first; the same bytes again replace what was cut short or damaged."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        image = stored(store)
        assert [method for method, _ in proxy.seen] == ["PUT"]
        whole = store.read_bytes(image.uri)
        for damaged in (whole[:3], whole[::-1]):
            store.write(f"images/{image.sha256}.png", damaged, "image/png")
            stored(store)
            assert store.read_bytes(image.uri) == whole


def test_missing_images_are_named(store: ImageStore) -> None:
    """Of many images, those that are gone or have another length are told, and only those."""
    images = [stored(store, b"image %d" % number) for number in range(20)]
    objects = store.objects
    store.write(objects.key(images[3].uri), b"cut", "image/png")
    gone = images[7].model_copy(update={"uri": store.uri("images/" + "0" * 64 + ".png")})
    expected = [images[3], gone]
    assert store.missing([*images[:7], gone, *images[8:]]) == expected
    with pytest.raises(ImageMissingError):
        store.open(gone.uri)


def test_only_this_stores_objects_are_read(store: ImageStore) -> None:
    """An address of another place is refused, also one that climbs out of the store."""
    for uri in (
        "file:///etc/passwd",
        "s3://elsewhere/a.png",
        store.uri("a").replace("/a", "/../../../etc/passwd"),
    ):
        with pytest.raises(StoreError):
            store.open(uri)


def test_documents(store: ImageStore) -> None:
    """Manifests and pages are written, replaced and read by key."""
    assert store.read("batches/1/manifest.jsonl") is None
    uri = store.write("batches/1/manifest.jsonl", b"{}\n", "application/jsonl")
    store.write("batches/1/manifest.jsonl", b"{}\n{}\n", "application/jsonl")
    assert uri == store.uri("batches/1/manifest.jsonl")
    assert store.read("batches/1/manifest.jsonl") == b"{}\n{}\n"


def test_all_threads_share_one_client(store: ImageStore) -> None:
    """Blocks with the same settings share a place, and 16 threads use it at once."""
    again = ImageStore.model_validate(store.model_dump())
    assert again.objects == store.objects
    with ThreadPoolExecutor(16) as threads:
        images = list(threads.map(lambda number: stored(again, b"%d" % number), range(48)))
        if isinstance(store.objects, S3):
            accounts = [store.objects.account, again.objects.account] * 8
            assert len(set(map(id, threads.map(s3_service.client_for, accounts)))) == 1
    assert store.missing(images) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # it is what the test is about
def test_a_forked_process_has_its_own_client(store: ImageStore) -> None:
    """A store that was used before a fork works in the child, and goes on working in the parent."""
    image = stored(store)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, store.read_bytes(image.uri))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"pixels"
    os.waitpid(child, 0)
    assert store.read_bytes(image.uri) == b"pixels"


def test_it_works_within_a_running_event_loop(s3_store: ImageStore) -> None:
    """The blocking methods may be called where an event loop is running, as in an async flow's own code."""
    import asyncio

    async def flow() -> bytes:
        return s3_store.read_bytes(stored(s3_store).uri)

    assert asyncio.run(flow()) == b"pixels"
    assert threading.active_count() < 100


@given(st.dictionaries(st.sampled_from(["prompt", "Model_Name", "x y"]), st.text(max_size=400)))
def test_metadata_fits_and_comes_back(metadata: dict[str, str]) -> None:
    """Any text becomes ASCII within S3's limit, and reads back as it was unless it had to be cut."""
    encoded = ascii_metadata(metadata)
    assert all(
        value.isascii() and value.isprintable() and value == value.strip() for value in encoded.values()
    )
    assert sum(len(name) + len(value) for name, value in encoded.items()) <= MOST_METADATA
    assert json.dumps(encoded).isascii()
    whole = {name.lower().replace("_", "-").replace(" ", "-"): value for name, value in metadata.items()}
    if sum(len(name) + 12 * len(value) for name, value in whole.items()) <= MOST_METADATA:
        assert {name: read_metadata(value) for name, value in encoded.items()} == whole


def test_long_metadata_is_cut_between_characters() -> None:
    """Where all of it is too long the longest values lose their ends, and no half character remains."""
    encoded = ascii_metadata({"model": "dall-e-2", "prompt": "灯台 " * 1000, "title": "x" * 5000})
    assert (
        MOST_METADATA - 64 <= sum(len(name) + len(value) for name, value in encoded.items()) <= MOST_METADATA
    )
    assert encoded["model"] == "dall-e-2"
    assert ("灯台 " * 1000).startswith(read_metadata(encoded["prompt"]))
    assert encoded["title"].strip("x") == ""


@pytest.mark.parametrize("kind", ["folder_store", "s3_store"])
def test_asking_whether_one_may_write_leaves_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    """A place for deliveries is tried without leaving an object in it."""
    place: ImageStore = request.getfixturevalue(kind)
    delivery_to(place).check()
    assert list(place.list("")) == []


def test_a_place_that_can_not_be_written_is_found(s3_server: S3Server, tmp_path: Path) -> None:
    """A folder below a file, and a bucket that does not exist, are refused in one line."""
    (tmp_path / "file").touch()
    for place in (
        ImageStore(url=str(tmp_path / "file" / "below")),
        ImageStore(url="s3://no-such-bucket/x", **s3_server.settings()),
    ):
        with pytest.raises(StoreError) as refused:
            delivery_to(place).check()
        assert "\n" not in str(refused.value)
