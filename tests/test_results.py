"""What passes between tasks: small, JSON-able, and forgiving about what the API counts."""

from __future__ import annotations

import io
import json
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefect_ttapi.images.spool import Spool
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import (
    CompletedImage,
    DeliveredImage,
    GeneratedImage,
    GeneratedImages,
    Generation,
    PartialImage,
    StoredImage,
    Usage,
)

REQUEST = ImageRequest(prompt="Ein Café 🌃", model="gpt-image-2", n=2, variant="b")
STORED = StoredImage(
    uri="s3://bucket/images/ab.png",
    sha256="ab",
    size_bytes=3,
    media_type="image/png",
    width=16,
    height=32,
    index=0,
    revised_prompt="a café",
    marks=("credentials", "xmp"),
)
GENERATION = Generation(
    request=REQUEST,
    request_hash=REQUEST.request_hash,
    api_origin="https://api.ttapi.io",
    created_at=datetime(2026, 5, 20, 12, 30, 1, 250_000, tzinfo=UTC),
    images=(STORED, STORED.model_copy(update={"index": 1, "revised_prompt": None})),
    usage=Usage.model_validate(
        {"input_tokens": 9, "total_tokens": 9, "input_tokens_details": {"text_tokens": 9}}
    ),
    api_calls=2,
    seconds=12.5,
    flow_run_id="f",
    task_run_id="t",
    request_id="r",
)
DELIVERED = DeliveredImage(uri="s3://b/k.png", sha256="ab", source_uri="s3://bucket/images/ab.png")


@pytest.mark.parametrize("thing", [STORED, GENERATION, DELIVERED])
def test_references_travel(thing: Any) -> None:
    """References survive JSON and pickle whole: results, records and manifests are made of them."""
    assert type(thing).model_validate_json(thing.model_dump_json()) == thing
    assert type(thing).model_validate(json.loads(json.dumps(thing.model_dump(mode="json")))) == thing
    assert pickle.loads(pickle.dumps(thing)) == thing


@pytest.mark.parametrize("thing", [STORED, GENERATION, DELIVERED, Usage()])
def test_references_are_frozen(thing: Any) -> None:
    """What was recorded can't be changed in passing."""
    for name in type(thing).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, None)


def test_a_reference_is_small() -> None:
    """A generation of ten images is a few kilobytes of JSON, whatever the images weigh."""
    ten = GENERATION.model_copy(update={"images": (STORED,) * 10})
    assert len(ten.model_dump_json()) < 5_000


def test_usage_on_the_vendors_page() -> None:
    """The page's own example is read, and a field that nobody knows yet is kept."""
    page = {
        "input_tokens": 9,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 9},
        "output_tokens": 4160,
        "total_tokens": 4169,
        "output_tokens_details": {"image_tokens": 4160},
        "cached_tokens": 3,
    }
    usage = Usage.model_validate(page)
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (9, 4160, 4169)
    assert usage.model_dump() == page


@pytest.mark.parametrize("odd", [None, "many", -1, 1.5, [], {}, float("nan"), float("inf")])
def test_an_odd_count_costs_no_image(odd: Any) -> None:
    """A count that can't be read is 0, the others stay: it came with images that are paid."""
    usage = Usage.model_validate({"input_tokens": odd, "output_tokens": 5, "input_tokens_details": 3})
    assert (usage.input_tokens, usage.output_tokens, usage.input_tokens_details) == (0, 5, None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from([*Usage.model_fields, "new"]) | st.text(max_size=9), json_values, max_size=6
    )
)
def test_any_usage_object_can_be_read(given: dict[str, Any]) -> None:
    """No JSON object in the place of the usage raises; counts are never negative."""
    usage = Usage.model_validate(given)
    assert min(usage.input_tokens, usage.output_tokens, usage.total_tokens) >= 0


@given(st.integers(), st.text(max_size=10))
def test_a_wrong_request_is_no_generation(n: int, model: str) -> None:
    """A record whose request is illegal is refused, with the place of the fault."""
    record = GENERATION.model_dump(mode="json")
    record["request"] |= {"n": n, "model": model}
    with pytest.raises(ValidationError) as caught:
        Generation.model_validate(record)
    assert caught.value.errors()[0]["loc"] == ("request", "model")


def test_images_from_the_wire_read_their_spool() -> None:
    """Bytes, hash and length are the spool's; each reader is new; nothing of the bytes is in the repr."""
    spool = Spool()
    spool.write(b"secret-bytes")
    image = GeneratedImage(spool=spool, media_type="image/png", width=1, height=2, index=0)
    assert (image.read_bytes(), image.size_bytes, image.sha256) == (b"secret-bytes", 12, spool.sha256)
    with image.open() as one, image.open() as two:
        assert isinstance(one, io.BufferedIOBase)
        assert one.read(6) == b"secret"
        assert two.read() == b"secret-bytes"
    assert "secret" not in repr(image)
    answer = GeneratedImages(images=(image,))
    assert (answer.attempts, answer.usage, answer.created) == (1, None, None)


def test_stream_events_have_bytes_too() -> None:
    """Previews and finished pictures of a stream open and read like any image."""
    spool = Spool()
    spool.write(b"p")
    assert PartialImage(spool=spool, media_type="image/webp", index=2).read_bytes() == b"p"
    done = CompletedImage(spool=spool, media_type="image/png", width=1, height=1, index=0, usage=Usage())
    assert isinstance(done, GeneratedImage)
    assert done.read_bytes() == b"p"


def test_presigning_is_the_stores_work() -> None:
    """presign hands the delivered object's own address and the seconds to the store."""

    class Signer:
        def presign(self, uri: str, seconds: int) -> str:
            return f"{uri}?for={seconds}"

    assert DELIVERED.presign(Signer(), 60) == "s3://b/k.png?for=60"
    assert DELIVERED.presign(Signer()) == "s3://b/k.png?for=3600"
