"""The endpoint over HTTP: the vendor's rules, shapes and items."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from prefect_ttapi import capabilities
from prefect_ttapi.origins import SANDBOX_ORIGIN, origin_of
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import Usage
from prefect_ttapi.sandbox import Sandbox

PATH = "/v1/images/generations"
Connect = Callable[..., httpx.Client]


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(PATH, json={"prompt": "a lighthouse", **body})


def images_of(client: httpx.Client, answer: dict[str, Any]) -> list[bytes]:
    return [
        base64.b64decode(item["b64_json"]) if "b64_json" in item else client.get(item["url"]).content
        for item in answer["data"]
    ]


def events_of(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = post(client, stream=True, **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    parsed = []
    for block in blocks:
        name, data = block.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
    return parsed


@pytest.mark.parametrize("model", capabilities.MODELS)
def test_every_model_answers(client: httpx.Client, model: str) -> None:
    """DALL-E models answer with URLs and no usage, GPT Image models with base64, usage and facts."""
    answer = post(client, model=model).json()
    [item] = answer["data"]
    [image] = images_of(client, answer)
    assert Image.open(io.BytesIO(image)).size == (64, 64)
    if model.startswith("gpt-"):
        assert "b64_json" in item
        assert Usage.model_validate(answer["usage"]).output_tokens == 4160
        facts = {"background": "opaque", "output_format": "png", "quality": "high", "size": "1024x1024"}
        assert facts.items() <= answer.items()
    else:
        assert item["url"].startswith(str(client.base_url))
        assert "usage" not in answer
    assert ("revised_prompt" in item) == (model == "dall-e-3")


@pytest.mark.parametrize(
    ("body", "output", "text"),
    [
        ({"quality": "low"}, 272, 3),
        ({"quality": "medium", "size": "1536x1024"}, 1584, 3),
        ({"quality": "high", "n": 3}, 3 * 4160, 3),
        ({"prompt": "x" * 400}, 4160, 100),
    ],
)
def test_usage_follows_size_quality_and_prompt(
    client: httpx.Client, body: dict[str, Any], output: int, text: int
) -> None:
    """Tokens grow with pixels, quality, images and the length of the prompt, and add up."""
    usage = post(client, model="gpt-image-1", **body).json()["usage"]
    assert usage == {
        "input_tokens": text,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": text},
        "output_tokens": output,
        "total_tokens": output + text,
    }


def test_formats_and_indices(client: httpx.Client) -> None:
    """n images come in the format asked for, and no two are equal."""
    answer = post(client, model="gpt-image-2", n=4, output_format="webp", background="transparent").json()
    images = images_of(client, answer)
    assert {Image.open(io.BytesIO(image)).format for image in images} == {"WEBP"}
    assert len(set(images)) == 4


def test_a_size_is_drawn_as_asked(connect: Connect) -> None:
    """Without `tiny`, pictures have the size that was asked for, in the answer and behind a URL."""
    with Sandbox() as sandbox, connect(base_url=sandbox.base_url) as client:
        for body in ({"model": "gpt-image-2", "size": "480x160"}, {"size": "256x256"}):
            [image] = images_of(client, post(client, **body).json())
            assert "x".join(map(str, Image.open(io.BytesIO(image)).size)) == body["size"]


@pytest.mark.parametrize(
    ("items", "kinds"),
    [("b64", ["b64_json"] * 3), ("url", ["url"] * 3), ("mixed", ["b64_json", "url", "b64_json"])],
)
def test_items_can_be_forced(connect: Connect, items: Any, kinds: list[str]) -> None:
    """Whatever the model, the sandbox can be told which kind of item to send; the bytes are the same."""
    with (
        Sandbox(tiny=True, items=items) as sandbox,
        connect(base_url=sandbox.base_url) as client,
    ):
        answers = [post(client, model=model, n=3).json() for model in ("dall-e-2", "gpt-image-2")]
        assert [[next(iter(item)) for item in answer["data"]] for answer in answers] == [kinds, kinds]
        assert len(set(images_of(client, answers[1]))) == 3


def test_b64_json_on_request(client: httpx.Client) -> None:
    """DALL-E models send base64 if asked, with the bytes that a URL would have led to."""
    as_url, as_base64 = (
        images_of(client, post(client, response_format=kind, n=2).json()) for kind in ("url", "b64_json")
    )
    assert as_url == as_base64


def test_both_roots_are_one(client: httpx.Client, sandbox: Sandbox) -> None:
    """The same routes answer at / and under /sandbox; an answer's URLs stay where they were asked for."""
    assert origin_of(sandbox.base_url) == SANDBOX_ORIGIN
    root = sandbox.base_url.removesuffix("/sandbox")
    [item] = client.post(root + PATH, json={"prompt": "a lighthouse"}).json()["data"]
    assert item["url"].startswith(f"{root}/files/")
    assert images_of(client, post(client).json()) == [client.get(item["url"]).content]
    assert client.get(f"{root}/stats").json()["paid"] == 2
    assert {client.post(f"{each}{PATH}/").status_code for each in (root, sandbox.base_url)} == {404}


def test_same_seed_same_bytes(connect: Connect) -> None:
    """Another sandbox with the same seed draws the same bytes; with another seed, others."""
    drawn = []
    for seed in (1, 1, 2):
        with (
            Sandbox(tiny=True, seed=seed) as sandbox,
            connect(base_url=sandbox.base_url) as client,
        ):
            drawn.append(images_of(client, post(client, model="gpt-image-1", n=2).json()))
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_image_bytes_sets_the_length(connect: Connect) -> None:
    """With image_bytes every finished PNG has that length, is readable, and is unlike the others."""
    with (
        Sandbox(tiny=True, image_bytes=300_000) as sandbox,
        connect(base_url=sandbox.base_url) as client,
    ):
        images = images_of(client, post(client, model="gpt-image-2", n=3).json())
    assert [len(image) for image in images] == [300_000] * 3
    assert len(set(images)) == 3
    for image in images:
        Image.open(io.BytesIO(image)).load()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 1001}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"model": "dall-e-4"}, "model"),
        ({"n": 11}, "n"),
        ({"n": "2"}, "n"),
        ({"model": "dall-e-3", "n": 2}, "n"),
        ({"size": "1536x1024"}, "size"),
        ({"model": "gpt-image-2", "size": "1000x1000"}, "size"),
        ({"model": "gpt-image-2", "size": "3856x2048"}, "size"),
        ({"model": "gpt-image-2", "background": "transparent", "output_format": "jpeg"}, "background"),
        ({"style": "vivid"}, "style"),
        ({"stream": True}, "stream"),
        ({"variant": "b"}, "variant"),
        ({"qualty": "high"}, "qualty"),
        ({"prompt": "[[sandbox:explode]]"}, "prompt"),
        ({"prompt": "[[sandbox:latency=nan]]"}, "prompt"),
        ({"prompt": "[[sandbox:status=200]]"}, "prompt"),
        ({"prompt": "[[sandbox:wrapped=1]] [[sandbox:times=x]]"}, "prompt"),
    ],
)
def test_illegal_requests_are_refused(
    client: httpx.Client, sandbox: Sandbox, body: dict[str, Any], param: str
) -> None:
    """What breaks the table of rules is a 400 in OpenAI's form that names the field; nothing is paid."""
    response = post(client, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"]
    assert (sandbox.calls, sandbox.paid) == (1, 0)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"prompt"', 400),
        (b'{"prompt": "\xff"}', 400),
        (b"[" * 100_000, 400),
        (b'{"n": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "' + b"x" * 1_100_000 + b'"}', 413),
    ],
)
def test_bad_bodies_are_refused(client: httpx.Client, body: bytes, status: int) -> None:
    """Bytes that are no JSON object, too deep, or too long get an error, and the sandbox goes on."""
    response = client.post(PATH, content=body)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert post(client).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"TT-API-KEY": ""}, 401),
        ({"TT-API-KEY": "wrong"}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"TT-API-KEY": "right"}, 200),
        ({"Authorization": "Bearer right"}, 200),
    ],
)
def test_only_the_given_key_is_right(connect: Connect, headers: dict[str, str], status: int) -> None:
    """With api_key, any other key or none gets the vendor's 401, before the body is judged or remembered."""
    with (
        Sandbox(api_key="right", tiny=True) as sandbox,
        connect(base_url=sandbox.base_url, headers=headers) as client,
    ):
        response = client.post(PATH, json={"prompt": "x"})
        assert response.status_code == status
        if status == 401:
            assert response.json() == {"status": "FAILED", "message": "Invalid TT-API-KEY.", "data": None}
            assert sandbox.requests == []


def test_a_key_is_needed(sandbox: Sandbox, connect: Connect) -> None:
    """Any key will do, but none is a 401."""
    with connect(base_url=sandbox.base_url, headers={}) as stranger:
        assert post(stranger).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", PATH, 405),
        ("POST", "/v1/images/edits", 404),
        ("GET", "/", 404),
        ("GET", "/files/nothing.png", 404),
        ("POST", "/stats", 405),
    ],
)
def test_other_addresses_do_not_exist(
    client: httpx.Client, sandbox: Sandbox, method: str, path: str, status: int
) -> None:
    """What is not served is an error in OpenAI's form, and no generation call."""
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert sandbox.calls == 0


@pytest.mark.parametrize("partial_images", [0, 1, 3])
def test_streams_end_with_the_image(client: httpx.Client, partial_images: int) -> None:
    """Partial pictures come first, numbered; the completed one is what a plain call answers."""
    body = {"model": "gpt-image-1.5", "output_format": "webp"}
    *partials, completed = events_of(client, partial_images=partial_images, **body)
    assert [each["partial_image_index"] for each in partials] == list(range(partial_images))
    assert {each["type"] for each in partials} <= {"image_generation.partial_image"}
    assert completed["type"] == "image_generation.completed"
    plain = post(client, **body).json()
    assert completed["b64_json"] == plain["data"][0]["b64_json"]
    assert completed["usage"] == plain["usage"]
    assert len({each["b64_json"] for each in [*partials, completed]}) == partial_images + 1
    for each in partials:
        assert each.keys() >= {"created_at", "size", "quality", "background", "output_format"}
        assert Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))).format == "WEBP"


def test_streams_of_several_images(client: httpx.Client, sandbox: Sandbox) -> None:
    """With n > 1 each image has its own partial pictures and its own completed event; one call is counted."""
    events = events_of(client, model="gpt-image-2", n=2, partial_images=1)
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image", "completed"] * 2
    assert (sandbox.calls, sandbox.paid, sandbox.images) == (1, 1, 2)


def test_a_prompt_can_ask_for_fewer_images(client: httpx.Client, sandbox: Sandbox) -> None:
    """`images` gives fewer than n, also none, plain and streamed."""
    fewer = post(client, prompt="[[sandbox:images=1]]", model="gpt-image-2", n=3).json()
    assert len(fewer["data"]) == 1
    assert post(client, prompt="[[sandbox:images=0]]").json()["data"] == []
    assert events_of(client, prompt="[[sandbox:images=0]]", model="gpt-image-2") == []
    assert sandbox.images == 1


def test_a_prompt_can_ask_for_the_older_form(client: httpx.Client) -> None:
    """`wrapped` puts the same answer in the vendor's older wrapper."""
    wrapped = post(client, prompt="[[sandbox:wrapped]]", model="gpt-image-2").json()
    assert wrapped["status"] == "SUCCESS"
    assert wrapped["data"].keys() >= {"created", "data", "usage"}


def test_counts_are_by_request_hash(client: httpx.Client, sandbox: Sandbox) -> None:
    """What arrived and what was paid is counted by the hash of the request, whatever form its body has."""
    post(client, prompt="a")
    post(client, prompt="a", size="auto", n=1, response_format="b64_json", user="me")
    post(client, prompt="b [[sandbox:moderation]]")
    once, never = (ImageRequest(prompt=prompt).request_hash for prompt in ("a", "b [[sandbox:moderation]]"))
    assert sandbox.calls_by_request == {once: 2, never: 1}
    assert sandbox.paid_by_request == {once: 2}
    assert [each["prompt"][0] for each in sandbox.requests] == ["a", "a", "b"]
    stats = client.get("/stats").json()
    assert stats.pop("calls_by_request") == sandbox.calls_by_request
    assert stats.pop("paid_by_request") == sandbox.paid_by_request
    assert stats == {
        "calls": 3,
        "paid": 2,
        "images": 2,
        "tokens": 0,
        "in_flight": 0,
        "most_in_flight": 1,
    }


def test_tokens_are_those_of_the_answers(client: httpx.Client, sandbox: Sandbox) -> None:
    """What is counted is what answers and events say; what was refused took none."""
    fields = {"model": "gpt-image-2", "n": 2}
    whole = post(client, prompt="a", **fields).json()["usage"]["total_tokens"]
    events = events_of(client, prompt="b", **fields)
    each = [event["usage"]["total_tokens"] for event in events if event["type"].endswith("completed")]
    post(client, prompt="c [[sandbox:moderation]]", **fields)
    assert sandbox.tokens == whole + sum(each)


def test_request_ids_are_sent(client: httpx.Client) -> None:
    """Every answer of the endpoint, good or bad, carries the number of the call."""
    responses = [post(client), post(client, n=99), post(client, model="gpt-image-2")]
    assert [each.headers["x-request-id"] for each in responses] == ["req-1", "req-2", "req-3"]
