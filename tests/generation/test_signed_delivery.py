"""Delivered files that are signed: once, for the right image, and never at the cost of what stands."""

from __future__ import annotations

import io
import json
import traceback
from dataclasses import replace
from typing import Any

import c2pa
import pytest

from prefect_ttapi import ContentCredentialsSigner, Provenance, Rendition
from prefect_ttapi.errors import KeyTakenError, SigningError
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.generation.files import note_of, without_mark
from prefect_ttapi.images.signing import ASSERTION
from prefect_ttapi.images.xmp import GENERATED
from prefect_ttapi.results import DeliveredImage, Generation
from prefect_ttapi.storage.store import ImageStore
from tests.support.certificates import STATEMENT, chain_for, signer
from tests.support.marked import delivery_of, encoded, forget_metadata, made_in
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server

RENDITIONS = [Rendition(max_size=32), Rendition(format="jpeg", max_size=16, mark=False)]
SHOP = ContentCredentialsSigner.for_testing("Acme shop")
SIGNED = Provenance(sign=SHOP)


@pytest.fixture
def store(each_store: ImageStore) -> ImageStore:
    """The test runs on each kind of store."""
    return each_store


def signed_delivery(store: ImageStore, **options: Any) -> Delivery:
    return delivery_of(store, RENDITIONS, SIGNED, **options)


def told_of(store: ImageStore, copy: DeliveredImage) -> tuple[dict[str, Any], dict[str, Any]]:
    """What c2pa's own reader says of a delivered file: all of it, and its active manifest."""
    with c2pa.Context.from_dict({"verify": {"remote_manifest_fetch": False}}) as context:
        told = json.loads(
            c2pa.Reader(copy.media_type, io.BytesIO(store.read_bytes(copy.uri)), context=context).json()
        )
    return told, told["manifests"][told["active_manifest"]]


def actions(manifest: dict[str, Any]) -> list[str]:
    found = next(one for one in manifest["assertions"] if one["label"].startswith("c2pa.actions"))
    return [action["action"] for action in found["data"]["actions"]]


def ours(manifest: dict[str, Any]) -> dict[str, str]:
    return next(one["data"] for one in manifest["assertions"] if one["label"] == ASSERTION)


def signed_original(store: ImageStore, form: str = "PNG") -> Generation:
    media_type, data = f"image/{form.lower()}", encoded(form)
    return made_in(
        store, signer().sign(lambda: io.BytesIO(data), media_type, STATEMENT).read_bytes(), media_type
    )


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_files_are_signed_for_their_image(store: ImageStore, form: str) -> None:
    """Copy and renditions are valid, name model, request, image and what was done; a second delivery signs nothing."""
    media_type, data = f"image/{form.lower()}", encoded(form)
    made = made_in(store, data, media_type)
    (image,) = made.images
    copies = signed_delivery(store).deliver(made, {})
    assert store.read_bytes(image.uri) == data
    converted = ["c2pa.converted"]
    done = {
        None: ["c2pa.created"],
        "webp-32": ["c2pa.created", "c2pa.resized", *(converted if form != "WEBP" else [])],
        "jpeg-16": ["c2pa.created", "c2pa.resized", *(converted if form != "JPEG" else [])],
    }
    marks = {None: ("credentials", "xmp"), "webp-32": ("credentials", "xmp"), "jpeg-16": ("credentials",)}
    for copy in copies:
        told, manifest = told_of(store, copy)
        assert told["validation_state"] == "Valid"
        assert actions(manifest) == done[copy.rendition]
        recipe = {"recipe": copy.recipe} if copy.recipe else {}
        assert ours(manifest) == {"request_hash": made.request_hash, "source_sha256": image.sha256} | recipe
        assert "lighthouse" not in json.dumps(told)
        assert (copy.marks, copy.signer) == (marks[copy.rendition], SHOP.get_signer().identity)
        assert copy.source_sha256 == image.sha256 != copy.sha256
    assert signed_delivery(store).deliver(made, {}) == copies
    assert without_mark(copies, signed_delivery(store).versions, SIGNED, SHOP.get_signer()) == 0


def test_files_of_a_signed_image_build_on_it(store: ImageStore) -> None:
    """The image is their parent, with its own manifest in them; the copy gets no XMP, and both are valid."""
    made = signed_original(store)
    copies = signed_delivery(store).deliver(made, {})
    for copy, done in zip(copies, ([], *[["c2pa.resized", "c2pa.converted"]] * 2), strict=True):
        told, manifest = told_of(store, copy)
        assert told["validation_state"] == "Valid"
        assert actions(manifest) == ["c2pa.opened", *done]
        (parent,) = manifest["ingredients"]
        assert parent["relationship"] == "parentOf"
        first = told["manifests"][parent["active_manifest"]]
        assert actions(first) == ["c2pa.created"]
        assert GENERATED in json.dumps(first)
    assert copies[0].marks == ("credentials",)
    assert signed_delivery(store).deliver(made, {}) == copies


def test_what_lost_its_metadata_is_known_by_what_is_signed_in_it(store: ImageStore) -> None:
    """After a kill or a transfer, a signed file says nothing of itself: it is still found, and not replaced."""
    made, other = made_in(store, encoded()), made_in(store, encoded("WEBP"), "image/webp")
    copies = signed_delivery(store).deliver(made, {})
    for copy in copies:
        forget_metadata(store, copy)
    again = signed_delivery(store).deliver(made, {})
    assert [(copy.sha256, copy.recipe, copy.marks) for copy in again] == [
        (copy.sha256, copy.recipe, copy.marks) for copy in copies
    ]
    unsigned = delivery_of(store, RENDITIONS).deliver(made, {})
    assert [(copy.sha256, copy.signer) for copy in unsigned] == [(copy.sha256, None) for copy in copies]
    for copy in copies:
        forget_metadata(store, copy)
    with pytest.raises(KeyTakenError):
        signed_delivery(store).deliver(other, {})
    bigger = replace(signed_delivery(store), versions=[None, Rendition(max_size=48, name="webp-32")])
    with pytest.raises(KeyTakenError):
        bigger.deliver(made, {})


def test_unsigned_files_of_before_stay(store: ImageStore) -> None:
    """They are neither an error nor rewritten; how many lack the signature is told, and overwrite signs them."""
    made = made_in(store, encoded())
    before = delivery_of(store, RENDITIONS, Provenance()).deliver(made, {})
    delivery = signed_delivery(store)
    assert delivery.deliver(made, {}) == before
    lacking = without_mark(before, delivery.versions, SIGNED, delivery.signer)
    assert note_of(lacking).startswith("3 delivered files were there before, without the mark or signature")
    renewed = signed_delivery(store, overwrite=True).deliver(made, {})
    assert without_mark(renewed, delivery.versions, SIGNED, delivery.signer) == 0
    another = ContentCredentialsSigner.for_testing("Another shop").get_signer()
    assert without_mark(renewed, delivery.versions, SIGNED, another) == 3


def test_what_is_there_costs_one_look(s3_server: S3Server) -> None:
    """A second delivery of a signed copy fetches nothing and writes nothing."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        made = made_in(store, encoded())
        delivery = delivery_of(store, provenance=SIGNED)
        delivery.deliver(made, {})
        proxy.seen.clear()
        delivery.deliver(made, {})
        assert [method for method, _ in proxy.seen] == ["HEAD"]


def test_an_image_with_damaged_credentials_is_not_signed_as_if_it_had_none(folder_store: ImageStore) -> None:
    """The error says why; nothing is delivered, and the image stays."""
    data = signer().sign(lambda: io.BytesIO(encoded()), "image/png", STATEMENT).read_bytes()
    at = data.index(b"c2pa.claim")
    made = made_in(folder_store, data[:at] + b"\xff" * 10 + data[at + 10 :])
    with pytest.raises(SigningError, match="can't sign as Acme shop: "):
        signed_delivery(folder_store).deliver(made, {})
    assert not list(folder_store.list("original"))
    assert folder_store.missing(made.images) == []


def test_a_signer_that_is_of_no_use_any_more(folder_store: ImageStore, tmp_path: Any) -> None:
    """A key that is gone, or replaced, is known by the check before anything is paid for; the error has no key."""
    chain, other = chain_for(), chain_for()
    (tmp_path / "key.pem").write_bytes(chain.key)
    block = ContentCredentialsSigner(certificates=chain.pem.decode(), private_key_file=tmp_path / "key.pem")
    provenance = Provenance(sign=block)
    delivery_of(folder_store, provenance=provenance).check()
    gone = "the file of private_key_file can't be read: No such file"
    for wrong, says in ((None, gone), (other.key, "does not belong to")):
        (tmp_path / "key.pem").unlink(missing_ok=True)
        if wrong:
            (tmp_path / "key.pem").write_bytes(wrong)
        delivery = delivery_of(folder_store, provenance=provenance)
        with pytest.raises(SigningError, match=says) as caught:
            delivery.check()
        with pytest.raises(SigningError, match=says):
            delivery.deliver(made_in(folder_store, encoded()), {})
        assert other.key.decode().splitlines()[1] not in "".join(traceback.format_exception(caught.value))
    stamped = ContentCredentialsSigner(
        certificates=chain.pem.decode(),
        private_key=chain.key.decode(),
        time_stamp_url="http://127.0.0.1:9",  # nobody listens there
    )
    with pytest.raises(SigningError, match="can't sign as Acme shop"):
        delivery_of(folder_store, provenance=Provenance(sign=stamped)).check()
    assert not list(folder_store.list("original"))
