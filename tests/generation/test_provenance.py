"""What delivered files say of where they come from, and that nothing which stands is rewritten for it."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image, ImageCms

from prefect_ttapi import Provenance, Rendition
from prefect_ttapi.cli.checks import verify
from prefect_ttapi.errors import PictureError, StoreError
from prefect_ttapi.generation.files import without_mark
from prefect_ttapi.images.labels import Labels, read_labels
from prefect_ttapi.images.xmp import EMPTY, Packet
from prefect_ttapi.results import DeliveredImage
from prefect_ttapi.storage.store import ImageStore
from tests.support.marked import REQUEST, delivery_of, encoded, forget_metadata, made_in
from tests.support.meddling import meddling_proxy
from tests.support.pictures import manifest_store, with_credentials
from tests.support.s3 import S3Server

RENDITIONS = [
    Rendition(max_size=32),
    Rendition(format="jpeg", max_size=16),
    Rendition(format="png", max_size=16),
]
EDITED = EMPTY.replace(
    b"</rdf:RDF>",
    b'<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="5"/></rdf:RDF>',
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def store(each_store: ImageStore) -> ImageStore:
    """The test runs on each kind of store."""
    return each_store


def labels(store: ImageStore, copy: DeliveredImage) -> Labels:
    found = read_labels(io.BytesIO(store.read_bytes(copy.uri)))
    assert found is not None
    return found


def test_renditions_say_what_they_are(store: ImageStore) -> None:
    """Each names model, request and image, keeps what the image's packet said, and tells no prompt."""
    data = encoded(xmp=EDITED, icc_profile=SRGB)
    made = made_in(store, data)
    copies = delivery_of(store, RENDITIONS).deliver(made, {})
    assert store.read_bytes(copies[0].uri) == data
    assert copies[0].marks == ()
    for copy in copies[1:]:
        found = labels(store, copy)
        assert found.marks == copy.marks == ("xmp",)
        assert (found.request_hash, found.source_sha256) == (made.request_hash, made.images[0].sha256)
        assert copy.source_sha256 == made.images[0].sha256 != copy.sha256
        packet = Packet(found.xmp or b"")
        assert packet["xmp:CreatorTool"] == "gpt-image-2"
        assert packet.properties["http://ns.adobe.com/xap/1.0/Rating"] == "5"
        with Image.open(io.BytesIO(store.read_bytes(copy.uri))) as image:
            profile = image.info["icc_profile"]
            assert "sRGB".encode("utf-16-be") in profile
            assert profile[24:36] == bytes(12)  # no date: each of them is the same
            image.load()
        assert b"lighthouse" not in store.read_bytes(copy.uri)
    assert delivery_of(store, RENDITIONS).deliver(made, {}) == copies
    assert [finding.kind for finding in verify(store)] == ["orphan"]  # no record names it here; it is whole


def test_a_mark_can_be_left_out_or_tell_the_prompt(folder_store: ImageStore) -> None:
    """`mark=False` leaves pixels only; `mark="prompt"` tells the prompt itself, whatever may be shown elsewhere."""
    plain, told = Rendition(name="plain", mark=False), Rendition(name="told", mark="prompt")
    made = made_in(folder_store, encoded(xmp=EDITED))
    copies = delivery_of(folder_store, [plain, told]).deliver(made, {}, "request 123")
    assert [copy.marks for copy in copies] == [(), (), ("xmp", "prompt")]
    assert labels(folder_store, copies[1]) == Labels()
    packet = Packet(labels(folder_store, copies[2]).xmp or b"")
    assert packet["Iptc4xmpExt:AIPromptInformation"] == REQUEST.prompt


def test_a_packet_that_is_no_use_costs_no_rendition(folder_store: ImageStore) -> None:
    """Where an image's packet contradicts the mark, or can't be read, the rendition has a packet of its own."""
    camera = EDITED.replace(
        b"xmp:Rating",
        b'xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" e:DigitalSourceType="digitalCapture" xmp:Rating',
    )
    for number, packet in enumerate((camera, b"<no packet")):
        made = made_in(folder_store, encoded(xmp=packet))
        delivery = replace(delivery_of(folder_store, RENDITIONS[:1]), key=f"{number}-{{rendition}}")
        assert delivery.deliver(made, {})[1].marks == ("xmp",)


def test_an_unmarked_rendition_of_before_stays(store: ImageStore) -> None:
    """What an earlier version delivered is neither an error nor rewritten; that it has no mark is told."""
    made = made_in(store, encoded())
    before = delivery_of(store, [Rendition(max_size=32, mark=False)]).deliver(made, {})
    data = store.read_bytes(before[1].uri)
    delivery = delivery_of(store, RENDITIONS[:1])
    again = delivery.deliver(made, {})
    assert again == before
    assert store.read_bytes(before[1].uri) == data
    assert without_mark(again, delivery.versions, None) == 1
    forget_metadata(store, before[1])
    assert replace_tag(delivery.deliver(made, {})[1]) == replace_tag(before[1])
    renewed = delivery_of(store, RENDITIONS[:1], overwrite=True).deliver(made, {})
    assert renewed[1].marks == ("xmp",)
    forget_metadata(store, renewed[1])
    plain = delivery_of(store, [Rendition(max_size=32, mark=False)])
    assert replace_tag(plain.deliver(made, {})[1]) == replace_tag(renewed[1])
    assert without_mark(renewed, delivery.versions, None) == 0


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_copy_is_marked_on_demand(store: ImageStore, form: str) -> None:
    """Its pixels and the stored image stay; it has a SHA-256 of its own beside the image's, and is delivered once."""
    data = encoded(form)
    made = made_in(store, data, f"image/{form.lower()}")
    (image,) = made.images
    delivery = delivery_of(store, provenance=Provenance())
    (copy,) = delivery.deliver(made, {})
    assert store.read_bytes(image.uri) == data
    assert copy.sha256 != image.sha256 == copy.source_sha256
    result = store.read_bytes(copy.uri)
    assert (copy.size_bytes, copy.marks, copy.width) == (len(result), ("xmp",), 64)
    assert labels(store, copy).source_sha256 == image.sha256
    with Image.open(io.BytesIO(result)) as one, Image.open(io.BytesIO(data)) as other:
        assert one.tobytes() == other.tobytes()
    found = store.objects.look(store.objects.key(copy.uri))
    assert found
    assert (found.metadata["sha256"], found.metadata["source-sha256"]) == (copy.sha256, image.sha256)
    assert delivery.deliver(made, {}) == [copy]
    assert delivery_of(store).deliver(made, {}) == [copy]
    assert all(place.is_of(copy) for place in delivery.places(delivery.keys(REQUEST, {}), made.images))
    forget_metadata(store, copy)
    for provenance in (Provenance(), Provenance(mark="prompt"), None):
        (again,) = delivery_of(store, provenance=provenance).deliver(made, {})
        assert replace_tag(again) == replace_tag(copy)
    store.write(store.objects.key(copy.uri), b"something else", "image/png")
    with pytest.raises(StoreError, match="holds something else"):
        delivery.deliver(made, {})
    assert [finding.kind for finding in verify(store)] == ["orphan"]  # no record names it here; it is whole


def replace_tag(copy: DeliveredImage) -> DeliveredImage:
    return copy.model_copy(update={"etag": None})


@pytest.mark.parametrize("provenance", [None, Provenance()])
def test_a_rendition_is_no_copy(folder_store: ImageStore, provenance: Provenance | None) -> None:
    """Nor is a copy a rendition, or another image's copy this one's: each has its key to itself."""
    made, other = (made_in(folder_store, encoded(form)) for form in ("PNG", "WEBP"))
    rendition = replace(delivery_of(folder_store), key="one", versions=(Rendition(max_size=32),))
    copies = replace(delivery_of(folder_store, provenance=provenance), key="two")
    rendition.deliver(made, {})
    replace(copies, provenance=Provenance()).deliver(made, {})
    for delivery, generation in (
        (replace(copies, key="one"), made),
        (replace(rendition, key="two"), made),
        (copies, other),
    ):
        with pytest.raises(StoreError, match="holds"):
            delivery.deliver(generation, {})


def test_a_plain_copy_of_before_stays(store: ImageStore) -> None:
    """A public file is not rewritten because an option changed; that it has no mark is told."""
    made = made_in(store, encoded())
    before = delivery_of(store).deliver(made, {})
    delivery = delivery_of(store, provenance=Provenance())
    assert delivery.deliver(made, {}) == before
    assert without_mark(before, delivery.versions, delivery.provenance) == 1
    (renewed,) = delivery_of(store, provenance=Provenance(), overwrite=True).deliver(made, {})
    assert renewed.marks == ("xmp",)


@pytest.mark.parametrize("known", [True, False])
def test_an_image_that_says_it_itself_is_copied_as_it_is(store: ImageStore, known: bool) -> None:
    """A signature stays valid; an image of an earlier version's record is looked into."""
    data = with_credentials(encoded(), manifest_store(3_000))
    made = made_in(store, data)
    if not known:
        (image,) = made.images
        made = made.model_copy(update={"images": (image.model_copy(update={"marks": None}),)})
    delivery = delivery_of(store, provenance=Provenance(mark="prompt"))
    (copy,) = delivery.deliver(made, {})
    assert store.read_bytes(copy.uri) == data
    assert copy.marks == ("credentials",)
    assert without_mark([copy], delivery.versions, delivery.provenance) == 0
    assert delivery.deliver(made, {}) == [copy]


@pytest.mark.parametrize("form", ["GIF", "BMP"])
def test_what_cannot_be_marked_is_not_delivered_without(folder_store: ImageStore, form: str) -> None:
    """Other kinds of files, and packets that can't be added to, are a clear error where a mark is asked for."""
    made = made_in(folder_store, encoded(form), f"image/{form.lower()}")
    with pytest.raises(PictureError, match="neither PNG nor JPEG nor WebP"):
        delivery_of(folder_store, provenance=Provenance()).deliver(made, {})
    assert not list(folder_store.list("original"))
    assert delivery_of(folder_store).deliver(made, {})[0].marks is None


def test_what_is_there_costs_one_look(s3_server: S3Server) -> None:
    """A second delivery of a marked copy fetches nothing and writes nothing."""
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(endpoint_url=proxy.url))
        made = made_in(store, encoded())
        delivery = delivery_of(store, provenance=Provenance())
        delivery.deliver(made, {})
        proxy.seen.clear()
        delivery.deliver(made, {})
        assert [method for method, _ in proxy.seen] == ["HEAD"]
