"""The sandbox seen by a client that nobody here wrote: the `openai` package."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image

from prefect_ttapi.sandbox import Sandbox


@pytest.fixture
def client_of_openai(sandbox: Sandbox) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="any", base_url=f"{sandbox.base_url}/v1", max_retries=0) as client:
        yield client


def test_images_as_base64(client_of_openai: openai.OpenAI, sandbox: Sandbox) -> None:
    """GPT Image models: pictures, usage and facts arrive in openai's own types."""
    answer = client_of_openai.images.generate(
        prompt="a cat", model="gpt-image-1", n=2, output_format="jpeg", quality="low", size="1536x1024"
    )
    assert answer.data is not None
    pictures = [base64.b64decode(item.b64_json or "") for item in answer.data]
    assert [Image.open(io.BytesIO(picture)).format for picture in pictures] == ["JPEG", "JPEG"]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1 + 2 * 408
    assert (answer.output_format, answer.quality, answer.size) == ("jpeg", "low", "1536x1024")
    assert (sandbox.calls, sandbox.paid) == (1, 1)


def test_images_as_urls(client_of_openai: openai.OpenAI) -> None:
    """dall-e-3: a URL and the prompt as revised."""
    answer = client_of_openai.images.generate(prompt="a cat", model="dall-e-3", style="natural")
    assert answer.data is not None
    [item] = answer.data
    assert item.url is not None
    assert item.url.endswith(".png")
    assert (item.revised_prompt or "").startswith("a cat")


def test_streams(client_of_openai: openai.OpenAI) -> None:
    """Events arrive typed: partial images by index, then the completed one with usage."""
    stream = client_of_openai.images.generate(
        prompt="a cat", model="gpt-image-1", stream=True, partial_images=2
    )
    *partials, completed = list(stream)
    assert [each.type for each in partials] == ["image_generation.partial_image"] * 2
    assert [each.partial_image_index for each in partials if each.type != completed.type] == [0, 1]
    assert completed.type == "image_generation.completed"
    assert completed.usage.output_tokens == 4160
    assert Image.open(io.BytesIO(base64.b64decode(completed.b64_json))).format == "PNG"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("400", openai.BadRequestError),
        ("401", openai.AuthenticationError),
        ("403", openai.PermissionDeniedError),
        ("404", openai.NotFoundError),
        ("422", openai.UnprocessableEntityError),
        ("429", openai.RateLimitError),
        ("502", openai.InternalServerError),
    ],
)
def test_failures_are_openais(
    client_of_openai: openai.OpenAI, name: str, error: type[openai.APIStatusError]
) -> None:
    """Each status becomes the exception that openai has for it."""
    with pytest.raises(error):
        client_of_openai.images.generate(prompt=f"[[sandbox:status={name}]]", model="dall-e-2")


def test_a_refused_prompt_has_openais_code(client_of_openai: openai.OpenAI) -> None:
    """Moderation and illegal values carry code and parameter as openai reads them."""
    with pytest.raises(openai.BadRequestError) as refused:
        client_of_openai.images.generate(prompt="[[sandbox:moderation]]", model="dall-e-2")
    assert refused.value.code == "moderation_blocked"
    with pytest.raises(openai.BadRequestError) as illegal:
        client_of_openai.images.generate(prompt="a cat", model="dall-e-2", size="1536x1024")
    assert illegal.value.param == "size"


def test_openai_retries_a_rate_limit(sandbox: Sandbox) -> None:
    """openai's own retry obeys the sandbox's Retry-After and gets the image at the second call."""
    with openai.OpenAI(api_key="any", base_url=f"{sandbox.base_url}/v1", max_retries=1) as client:
        answer = client.images.generate(
            prompt="[[sandbox:status=429]] [[sandbox:times=1]]", model="dall-e-2", response_format="b64_json"
        )
    assert answer.data
    assert (sandbox.calls, sandbox.paid) == (2, 1)
