"""What the API would answer to a request, part by part: no more than one image is held at a time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox.behaviour import Behaviour, Refused
from prefect_ttapi.sandbox.pictures import Picture, Studio

#: OpenAI's limit for gpt-image-2, pixels on the long side.
LONGEST_SIDE: Final = 3840
_TINY: Final = 64

#: Output tokens of a 1024x1024 image of the GPT Image models; other sizes in proportion to their area.
_TOKENS: Final = {"low": 272, "medium": 1056, "high": 4160}
_CHARACTERS_PER_TOKEN: Final = 4

#: The vendor's older form stands around the answer.
_WRAPPER: Final = ('{"status": "SUCCESS", "message": "success", "data": ', "}")

#: Blocks of the first, second, third unfinished picture are this many pixels wide.
_BLOCKS: Final = (64, 32, 16)


def request_of(body: object) -> ImageRequest:
    """Return the request in a JSON body.

    Raises:
        Refused: 400, naming the first wrong field as `param`.
    """
    if not isinstance(body, dict):
        raise Refused.for_request("The body must be a JSON object.", code="invalid_json")
    if "variant" in body:  # ours alone: a client that sends it has a fault
        raise Refused.for_request("Unknown parameter: 'variant'.", "variant", code="unknown_parameter")
    try:
        request = ImageRequest.model_validate(body, strict=True)
    except ValidationError as error:
        wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors(include_url=False)]
        raise Refused.for_request("; ".join(f"{name} {what}" for name, what in wrong), wrong[0][0]) from None
    if max(_size_of(request)) > LONGEST_SIDE:
        message = f"size is {request.size}; the longest side may have {LONGEST_SIDE} pixels"
        raise Refused.for_request(message, "size")
    return request


@dataclass(frozen=True)
class Answer:
    """The images of one request.

    Attributes:
        request: what was asked.
        images: how many to give.
        latency: seconds that they take.
        wrapped: whether in the vendor's older form.
        files_url: where files are, with a slash at the end.
    """

    request: ImageRequest
    images: int
    latency: float
    wrapped: bool
    files_url: str
    behaviour: Behaviour
    studio: Studio

    async def as_json(self) -> AsyncGenerator[bytes]:
        """Yield one JSON object; the first part comes after the latency, with the first image in it."""
        await asyncio.sleep(self.latency)
        before, after = _WRAPPER if self.wrapped else ("", "")
        facts = json.dumps({"created": int(time.time()), **_facts_of(self.request)})[:-1]
        usage = _usage_of(self.request, self.images)
        counted = f', "usage": {json.dumps(usage)}' if usage else ""
        part = f'{before}{facts}, "data": ['.encode()
        for index in range(self.images):
            yield part + await self._item(index)
            part = b", "
        yield (b"" if self.images else part) + f"]{counted}}}{after}".encode()

    async def as_events(self) -> AsyncGenerator[bytes]:
        """Yield server-sent events; the latency is spread over them."""
        partial_images = self.request.partial_images
        pause = self.latency / max(1, self.images * (partial_images + 1))
        for index in range(self.images):
            for number, blocks in enumerate(_BLOCKS[:partial_images]):
                await asyncio.sleep(pause)
                yield await self._event("partial_image", index, blocks, partial_image_index=number)
            await asyncio.sleep(pause)
            yield await self._event("completed", index, usage=_usage_of(self.request, 1))

    async def _event(self, kind: str, index: int, blocks: int = 1, **more: Any) -> bytes:
        kind = f"image_generation.{kind}"
        fields = {"type": kind, "created_at": int(time.time()), **_facts_of(self.request), **more}
        encoded = await asyncio.to_thread(self.studio.base64, self._picture(index, blocks))
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _with_base64(fields, encoded))

    async def _item(self, index: int) -> bytes:
        picture = self._picture(index)
        revised = {"revised_prompt": f"{self.request.prompt}, as the sandbox sees it"}
        fields = revised if self.request.model == "dall-e-3" else {}
        by_model = _is_gpt(self.request) or self.request.response_format == "b64_json"
        as_base64 = {"model": by_model, "b64": True, "url": False, "mixed": index % 2 == 0}
        if as_base64[self.behaviour.items]:
            return _with_base64(fields, await asyncio.to_thread(self.studio.base64, picture))
        return json.dumps({"url": self.files_url + self.studio.file_for(picture)} | fields).encode()

    def _picture(self, index: int, blocks: int = 1) -> Picture:
        request, (width, height) = self.request, _size_of(self.request)
        shrink = min(1.0, _TINY / max(width, height)) if self.behaviour.tiny else 1.0
        return Picture(
            request,
            width=max(1, round(width * shrink)),
            height=max(1, round(height * shrink)),
            key=hashlib.sha256(f"{self.behaviour.seed}/{request.request_hash}".encode()).hexdigest(),
            index=index,
            blocks=blocks,
        )


def _is_gpt(request: ImageRequest) -> bool:
    return request.model.startswith("gpt-")


def _size_of(request: ImageRequest) -> tuple[int, int]:
    width, _, height = ("1024x1024" if request.size == "auto" else request.size).partition("x")
    return int(width), int(height)


def _facts_of(request: ImageRequest) -> dict[str, Any]:
    """Return what was left to the API to decide; GPT Image models say so beside the images."""
    if not _is_gpt(request):
        return {}
    width, height = _size_of(request)
    return {
        "background": "transparent" if request.background == "transparent" else "opaque",
        "output_format": request.output_format,
        "quality": "high" if request.quality == "auto" else request.quality,
        "size": f"{width}x{height}",
    }


def _usage_of(request: ImageRequest, images: int) -> dict[str, Any] | None:
    """Return the tokens for `images` images; DALL-E models don't count them."""
    if not _is_gpt(request):
        return None
    width, height = _size_of(request)
    each = round(_TOKENS[_facts_of(request)["quality"]] * width * height / (1024 * 1024))
    text = max(1, len(request.prompt) // _CHARACTERS_PER_TOKEN)
    return {
        "input_tokens": text,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": text},
        "output_tokens": each * images,
        "total_tokens": text + each * images,
    }


def _with_base64(fields: dict[str, Any], encoded: bytes) -> bytes:
    """Return JSON of the fields and `b64_json`; by hand, because json.dumps would search megabytes for escapes."""
    others = json.dumps(fields)[1:-1].encode()
    return b"".join((b'{"b64_json": "', encoded, b'", ' if others else b'"', others, b"}"))
