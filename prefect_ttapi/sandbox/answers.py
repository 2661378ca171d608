"""What the API would say of a request, apart from the bytes of its images."""

from __future__ import annotations

import hashlib
from typing import Any, Final

from pydantic import ValidationError

from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox.failures import Failure, Refused
from prefect_ttapi.sandbox.pictures import Picture
from prefect_ttapi.sandbox.settings import Settings

#: OpenAI's limit for gpt-image-2, pixels on the long side.
LONGEST_SIDE: Final = 3840
_TINY: Final = 64

#: Output tokens of a 1024x1024 image of the GPT Image models; other sizes in proportion to their area.
_TOKENS: Final = {"low": 272, "medium": 1056, "high": 4160}
_CHARACTERS_PER_TOKEN: Final = 4


def request_of(body: object) -> ImageRequest:
    """The request in a JSON body.

    Raises:
        Refused: 400, naming the first wrong field as `param`.
    """
    if not isinstance(body, dict):
        raise Refused(Failure(400, "openai", "The body must be a JSON object.", "invalid_json"))
    if "variant" in body:  # ours alone: a client that sends it has a fault
        raise Refused(Failure(400, "openai", "Unknown parameter: 'variant'.", "unknown_parameter", "variant"))
    try:
        request = ImageRequest.model_validate(body, strict=True)
    except ValidationError as error:
        wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors(include_url=False)]
        message = "; ".join(f"{name} {what}" for name, what in wrong)
        raise Refused(Failure(400, "openai", message, "invalid_value", wrong[0][0])) from None
    if max(size_of(request)) > LONGEST_SIDE:
        message = f"size is {request.size}; the longest side may have {LONGEST_SIDE} pixels"
        raise Refused(Failure(400, "openai", message, "invalid_value", "size"))
    return request


def is_gpt(request: ImageRequest) -> bool:
    """Whether a GPT Image model was asked."""
    return request.model.startswith("gpt-")


def size_of(request: ImageRequest) -> tuple[int, int]:
    """Width and height in pixels; `auto` is 1024x1024."""
    if request.size == "auto":
        return 1024, 1024
    width, height = request.size.split("x")
    return int(width), int(height)


def facts_of(request: ImageRequest) -> dict[str, Any]:
    """What the API decided where it was left to it; GPT Image models say so beside the images."""
    if not is_gpt(request):
        return {}
    width, height = size_of(request)
    return {
        "background": "transparent" if request.background == "transparent" else "opaque",
        "output_format": request.output_format,
        "quality": "high" if request.quality == "auto" else request.quality,
        "size": f"{width}x{height}",
    }


def usage_of(request: ImageRequest, images: int) -> dict[str, Any] | None:
    """Tokens for `images` images; DALL-E models don't count them."""
    if not is_gpt(request):
        return None
    width, height = size_of(request)
    each = round(_TOKENS[facts_of(request)["quality"]] * width * height / (1024 * 1024))
    text = max(1, len(request.prompt) // _CHARACTERS_PER_TOKEN)
    return {
        "input_tokens": text,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": text},
        "output_tokens": each * images,
        "total_tokens": text + each * images,
    }


def revised_prompt_of(request: ImageRequest) -> str | None:
    """The prompt as dall-e-3 would have rewritten it."""
    return f"{request.prompt}, as the sandbox sees it" if request.model == "dall-e-3" else None


def picture_of(request: ImageRequest, index: int, settings: Settings, blocks: int = 1) -> Picture:
    """What to draw for image `index` of the answer; `blocks` as in `Picture`."""
    width, height = size_of(request)
    shrink = min(1.0, _TINY / max(width, height)) if settings.tiny else 1.0
    return Picture(
        prompt=request.prompt,
        model=request.model,
        width=max(1, round(width * shrink)),
        height=max(1, round(height * shrink)),
        key=hashlib.sha256(f"{settings.seed}/{request.request_hash}".encode()).hexdigest(),
        index=index,
        count=request.n,
        output_format=request.output_format,
        compression=request.output_compression,
        transparent=request.background == "transparent",
        blocks=blocks,
    )
