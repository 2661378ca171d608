"""A request's identity, what is sent for it, and how its errors read."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from prefect_ttapi.requests import ImageRequest

#: Fields, the canonical JSON (RFC 8785) written by hand, and its SHA-256. Records are filed under these for
#: ever: if one of them changes, everybody pays for every image once more.
GOLDEN = [
    (
        {"prompt": "a lighthouse"},
        '{"model":"dall-e-2","n":1,"prompt":"a lighthouse","quality":"auto","size":"auto"}',
        "06754940077368db85ecdd413e600fffaa8bccfae0a08b14b27c9299c1507e16",
    ),
    (
        {"prompt": "a lighthouse", "model": "gpt-image-2", "size": "1536x1024"},
        '{"background":"auto","model":"gpt-image-2","moderation":"auto","n":1,"output_compression":100,'
        '"output_format":"png","prompt":"a lighthouse","quality":"auto","size":"1536x1024"}',
        "725f7723f7ec42c0ed4baaac12fd7b1fef4a698ef24e68a5cca7247bcfdfe8a8",
    ),
    (
        {
            "prompt": "A logo",
            "model": "gpt-image-1.5",
            "n": 4,
            "size": "1024x1536",
            "quality": "high",
            "background": "opaque",
            "moderation": "low",
            "output_format": "webp",
            "output_compression": 80,
            "stream": True,
            "partial_images": 2,
            "user": "u-1",
            "variant": "b",
        },
        '{"background":"opaque","model":"gpt-image-1.5","moderation":"low","n":4,"output_compression":80,'
        '"output_format":"webp","prompt":"A logo","quality":"high","size":"1024x1536","variant":"b"}',
        "dabb82ad3bee3d5c89278019adf7783cca4fed2e67dcfda17f3151f1a583d1db",
    ),
    (
        {"prompt": 'Ein "Café" – 夜の\t🌃\\/\n\x1f\x7f', "model": "gpt-image-1", "background": "transparent"},
        '{"background":"transparent","model":"gpt-image-1","moderation":"auto","n":1,"output_compression":100,'
        '"output_format":"png","prompt":"Ein \\"Café\\" – 夜の\\t🌃\\\\/\\n\\u001f\x7f","quality":"auto",'
        '"size":"auto"}',
        "55345ef2557b570eca3cdb06d0aa117cec15b828014547e65334f66ffdf9c8fe",
    ),
    (
        {"prompt": "x", "model": "dall-e-3", "style": "vivid", "quality": "hd", "response_format": "url"},
        '{"model":"dall-e-3","n":1,"prompt":"x","quality":"hd","size":"auto","style":"vivid"}',
        "2dd8600573b6d80ec6ea22761a05861b49d269df77fddf73d6380348618b3246",
    ),
    (
        {"prompt": "x", "model": "dall-e-3", "variant": "2"},
        '{"model":"dall-e-3","n":1,"prompt":"x","quality":"auto","size":"auto","variant":"2"}',
        "122ccd73e42c1e2cf79b7016a0300b51cdc624080a5b7ed4f34f1f22163629b8",
    ),
    (
        {"prompt": "x", "n": 10, "size": "256x256", "quality": "standard", "background": "auto"},
        '{"model":"dall-e-2","n":10,"prompt":"x","quality":"standard","size":"256x256"}',
        "ac625c9e292b2fc0e058821871ab165386050f2fa040a32f8b456a1a0f49f0c1",
    ),
]

#: What the vendor's page gives as the default of every field.
DEFAULTS: dict[str, Any] = {
    "model": "dall-e-2", "n": 1, "size": "auto", "quality": "auto", "output_format": "png", "stream": False,
    "background": "auto", "moderation": "auto", "output_compression": 100, "partial_images": 0,
}  # fmt: skip

prompts = st.text(min_size=1, max_size=60).filter(str.strip)
gpt_fields = st.fixed_dictionaries(
    {"prompt": prompts, "model": st.sampled_from(["gpt-image-2", "gpt-image-1.5", "gpt-image-1"])},
    optional={
        "n": st.integers(1, 10),
        "size": st.sampled_from(["auto", "1024x1024", "1536x1024", "1024x1536"]),
        "quality": st.sampled_from(["auto", "low", "medium", "high"]),
        "background": st.sampled_from(["auto", "opaque"]),
        "moderation": st.sampled_from(["auto", "low"]),
        "output_format": st.sampled_from(["png", "jpeg", "webp"]),
        "output_compression": st.just(100),
        "variant": st.text(min_size=1, max_size=10),
    },
)
dalle_fields = st.one_of(
    st.fixed_dictionaries(
        {"prompt": prompts, "model": st.just("dall-e-3")},
        optional={
            "size": st.sampled_from(["auto", "1024x1024", "1792x1024", "1024x1792"]),
            "quality": st.sampled_from(["auto", "standard", "hd"]),
            "style": st.sampled_from(["vivid", "natural"]),
            "variant": st.text(min_size=1, max_size=10),
        },
    ),
    st.fixed_dictionaries(
        {"prompt": prompts},
        optional={
            "model": st.just("dall-e-2"),
            "n": st.integers(1, 10),
            "size": st.sampled_from(["auto", "256x256", "512x512", "1024x1024"]),
            "quality": st.sampled_from(["auto", "standard"]),
        },
    ),
)
fields = st.one_of(gpt_fields, dalle_fields)


def make(given: dict[str, Any], **more: Any) -> ImageRequest:
    return ImageRequest.model_validate(given | more)


@pytest.mark.parametrize(("given", "canonical", "digest"), GOLDEN)
def test_golden_hashes(given: dict[str, Any], canonical: str, digest: str) -> None:
    """The hash is the SHA-256 of the canonical JSON as a person writes it, and these digests never change."""
    assert hashlib.sha256(canonical.encode()).hexdigest() == digest
    assert make(given).request_hash == digest


def test_hash_in_another_process() -> None:
    """A process with another seed for Python's own hashes agrees on the request's hash."""
    code = (
        "from prefect_ttapi.requests import ImageRequest as R;"
        "print(R(prompt='a lighthouse', model='gpt-image-2', size='1536x1024').request_hash)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "4711", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == GOLDEN[1][2]


@given(fields, st.randoms(use_true_random=False))
def test_the_order_of_fields_does_not_matter(given: dict[str, Any], random: Any) -> None:
    """The same fields in any order are the same request."""
    names = list(given)
    random.shuffle(names)
    shuffled = ImageRequest.model_validate({name: given[name] for name in names})
    assert shuffled == make(given)
    assert shuffled.request_hash == make(given).request_hash


@given(fields, st.sets(st.sampled_from(sorted(DEFAULTS))))
def test_defaults_written_or_left_out_are_the_same(given: dict[str, Any], written: set[str]) -> None:
    """Leaving a field out and writing its default are one request with one hash and one body."""
    explicit = make({name: DEFAULTS[name] for name in written} | given)
    bare = make({name: value for name, value in given.items() if DEFAULTS.get(name) != value})
    assert explicit == bare
    assert hash(explicit) == hash(bare)
    assert explicit.request_hash == bare.request_hash
    assert explicit.body() == bare.body()


@given(fields, st.text(max_size=8))
def test_what_does_not_shape_the_image_is_not_hashed(given: dict[str, Any], user: str) -> None:
    """user, stream, partial_images and response_format leave the hash alone."""
    plain = make(given).request_hash
    assert make(given, user=user).request_hash == plain
    if make(given).model.startswith("dall-e"):
        assert make(given, response_format="url").request_hash == plain
        assert make(given, response_format="b64_json").request_hash == plain
    else:
        assert make(given, stream=True).request_hash == plain
        assert make(given, stream=True, partial_images=3).request_hash == plain


@given(fields, st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8))
def test_a_variant_is_another_sample(given: dict[str, Any], one: str, two: str) -> None:
    """Each variant has a hash of its own, and so has the request without one."""
    bare = {name: value for name, value in given.items() if name != "variant"}
    hashes = {
        make(bare).request_hash,
        make(bare, variant=one).request_hash,
        make(bare, variant=two).request_hash,
    }
    assert len(hashes) == (3 if one != two else 2)


@given(fields, fields)
def test_requests_share_a_hash_only_if_they_are_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Without fields that do not shape the image, equal hashes mean equal requests and the reverse."""
    assert (make(one).request_hash == make(two).request_hash) == (make(one) == make(two))


def test_every_shaping_field_changes_the_hash() -> None:
    """Each of the fields that shape an image makes a request of its own."""
    base = {"prompt": "x", "model": "gpt-image-2", "output_format": "webp"}
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "y"},
        {"prompt": "x "},
        {"model": "gpt-image-1.5"},
        {"model": "gpt-image-1"},
        {"n": 2},
        {"size": "1024x1024"},
        {"quality": "low"},
        {"background": "transparent"},
        {"moderation": "low"},
        {"output_format": "jpeg"},
        {"output_compression": 99},
        {"variant": "1"},
        {"model": "dall-e-3", "output_format": "png"},
        {"model": "dall-e-3", "output_format": "png", "style": "vivid"},
        {"model": "dall-e-3", "output_format": "png", "style": "natural"},
    ]
    assert len({make(base, **change).request_hash for change in changes}) == len(changes)


def test_unicode_is_hashed_as_given() -> None:
    """Composed and decomposed letters are two requests: nothing rewrites what a person asked for."""
    composed, decomposed = (unicodedata.normalize(form, "Café Ångström") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert make({"prompt": composed}).prompt == composed
    assert make({"prompt": decomposed}).body()["prompt"] == decomposed
    assert make({"prompt": composed}).request_hash != make({"prompt": decomposed}).request_hash


def test_the_vendors_example() -> None:
    """The body on the vendor's page, with a number that is legal for its n, is accepted as it stands."""
    body = {
        "prompt": "<string>",
        "model": "dall-e-2",
        "background": "auto",
        "moderation": "auto",
        "n": 3,
        "output_compression": 100,
        "output_format": "png",
        "partial_images": 0,
        "quality": "auto",
        "size": "auto",
        "stream": False,
        "user": "<string>",
    }
    request = ImageRequest.model_validate(body)
    assert request.body() == {"model": "dall-e-2", "prompt": "<string>", "n": 3, "user": "<string>"}


def test_a_body_holds_what_differs_from_the_defaults() -> None:
    """All that was changed is sent, under the vendor's names; our own `variant` never is."""
    asked = dict(GOLDEN[2][0])
    request = ImageRequest.model_validate(asked)
    sent = {name: asked[name] for name in asked if name not in ("variant", "stream", "partial_images")}
    assert request.body() == sent
    assert request.body(stream=True) == sent | {"stream": True, "partial_images": 2}
    assert make(GOLDEN[4][0]).body() == GOLDEN[4][0]


def test_streaming_is_the_callers_choice() -> None:
    """A body asks for a stream exactly when the caller does, whatever the request says."""
    quiet = make({"prompt": "x", "model": "gpt-image-1"})
    assert quiet.body(stream=True) == {"model": "gpt-image-1", "prompt": "x", "stream": True}
    loud = make({"prompt": "x", "model": "gpt-image-1", "stream": True, "partial_images": 1})
    assert loud.body() == {"model": "gpt-image-1", "prompt": "x"}


@given(fields)
def test_a_body_sent_back_is_the_same_request(given: dict[str, Any]) -> None:
    """What is sent says everything that shapes the image but the variant."""
    request = make(given)
    assert make(request.body(), variant=request.variant).request_hash == request.request_hash


@given(fields)
def test_requests_travel(given: dict[str, Any]) -> None:
    """JSON, pickle and copies give an equal request with the same hash; equal requests are one dict key."""
    request = make(given)
    twins = [
        ImageRequest.model_validate_json(request.model_dump_json()),
        ImageRequest.model_validate(request.model_dump()),
        ImageRequest.model_validate(request),
        pickle.loads(pickle.dumps(request)),
        copy.copy(request),
        copy.deepcopy(request),
        request.model_copy(),
    ]
    for twin in twins:
        assert twin == request
        assert twin.request_hash == request.request_hash
    assert len({request, *twins}) == 1


def test_a_changed_copy_is_a_request_of_its_own() -> None:
    """model_copy gives the hash of what it holds, also after the original's hash was asked for."""
    request = make({"prompt": "x"})
    first = request.request_hash
    assert (
        request.model_copy(update={"variant": "2"}).request_hash
        == make({"prompt": "x", "variant": "2"}).request_hash
    )
    assert request.model_copy(update={"prompt": "y"}).request_hash != first
    assert ImageRequest.model_construct(**{**vars(request), "prompt": "y"}).request_hash != first
    assert make(dict(request)).request_hash == request.request_hash == first


def test_a_changed_copy_is_validated() -> None:
    """model_copy refuses what a new request would refuse."""
    request = make({"prompt": "x", "n": 2})
    with pytest.raises(ValidationError, match="dall-e-3; legal: 1"):
        request.model_copy(update={"model": "dall-e-3"})
    with pytest.raises(ValidationError, match="did you mean size"):
        request.model_copy(update={"sise": "auto"})


def test_requests_are_frozen() -> None:
    """A request that has a hash can't be changed under it."""
    request = make({"prompt": "x"})
    assert request.request_hash
    for name in [*ImageRequest.model_fields, "request_hash"]:
        with pytest.raises((ValidationError, AttributeError), match=r"frozen|setter"):
            setattr(request, name, "y")
        with pytest.raises(ValidationError, match="frozen"):
            delattr(request, name)


def test_all_errors_at_once() -> None:
    """One error holds every fault of a request, each under its own field, unknown fields included."""
    wrong = {"prompt": "", "model": "dall-e-3", "n": 2, "size": "1x1", "quality": "low", "style": "loud"}
    wrong |= {"response_format": "png", "background": "opaque", "stream": True, "modle": "x", "negative": "y"}
    with pytest.raises(ValidationError) as caught:
        ImageRequest.model_validate(wrong)
    found = {error["loc"]: error["msg"] for error in caught.value.errors()}
    assert set(found) == {(name,) for name in wrong if name != "model"}
    assert caught.value.title == "ImageRequest"
    assert "did you mean model?" in found[("modle",)]
    assert "legal: model, prompt" in found[("negative",)]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("modle", "model"),
        ("sise", "size"),
        ("Prompt", "prompt"),
        ("ouput_format", "output_format"),
        ("partial_image", "partial_images"),
        ("num", "n"),
    ],
)
def test_unknown_fields_are_told_the_nearest_name(name: str, near: str) -> None:
    """A misspelt field is refused with the field that was probably meant."""
    with pytest.raises(ValidationError, match=rf"did you mean {near}\?"):
        ImageRequest.model_validate({"prompt": "x", name: "y"})


@pytest.mark.parametrize("name", ["", "\ud800", "{legal}", "x" * 10_000, 5, None, ("a",)])
def test_odd_names_of_fields_are_refused_in_one_line(name: object) -> None:
    """Whatever a mapping's keys are, the answer is a ValidationError."""
    with pytest.raises(ValidationError, match="is no field of an image request; legal: model, "):
        ImageRequest.model_validate({"prompt": "x", name: 1})


@pytest.mark.parametrize("text", ["{why}", "{shown} {model} {message}", "{}", "{0}", "%s", "\\"])
def test_braces_in_values_stay_text(text: str) -> None:
    """A value is shown as it was given: it is never taken for a piece of the message's own template."""
    with pytest.raises(ValidationError) as caught:
        ImageRequest.model_validate({"prompt": "x", "size": text})
    assert f"is {text!a} for dall-e-2; legal: auto, 256x256" in caught.value.errors()[0]["msg"]


def test_errors_never_repeat_a_long_prompt() -> None:
    """An error about a prompt says how long it is instead of showing it."""
    with pytest.raises(ValidationError) as caught:
        ImageRequest(prompt="secret " * 1000, model="dall-e-3", n=2)
    assert "secret" not in str(caught.value)
    assert "is 7,000 characters long for dall-e-3; legal: 1 to 4,000 characters" in str(caught.value)


@pytest.mark.parametrize("data", ["text", b"bytes", None, 5, [("prompt", "x")], object()])
def test_what_is_no_mapping_is_refused(data: object) -> None:
    """Only mappings and requests are requests."""
    with pytest.raises(ValidationError, match="dictionary or instance of ImageRequest"):
        ImageRequest.model_validate(data)


def test_errors_inside_other_models_keep_their_place() -> None:
    """In a list of a larger model, a fault's location leads to its item and field."""

    class Campaign(BaseModel):
        items: list[ImageRequest]

    with pytest.raises(ValidationError) as caught:
        Campaign.model_validate({"items": [{"prompt": "x"}, {"prompt": "x", "sise": 1, "n": 0}]})
    assert [error["loc"] for error in caught.value.errors()] == [("items", 1, "sise"), ("items", 1, "n")]


@given(
    st.dictionaries(
        st.text(max_size=12), st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.floats())
    )
)
def test_any_mapping_is_judged_not_crashed_on(data: dict[str, Any]) -> None:
    """No mapping makes validation do anything but accept or raise a ValidationError."""
    try:
        request = ImageRequest.model_validate(data)
    except ValidationError:
        return
    assert len(request.request_hash) == 64
