"""The body of an answer with images, part by part: no more than one image is held at a time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox.answers import facts_of, is_gpt, picture_of, revised_prompt_of, usage_of
from prefect_ttapi.sandbox.settings import Settings
from prefect_ttapi.sandbox.studio import Studio

#: Blocks of the first, second, third unfinished picture are this many pixels wide.
_BLOCKS = (64, 32, 16)


@dataclass(frozen=True)
class Answer:
    """What is to be answered.

    Attributes:
        request: what was asked.
        images: how many to give.
        latency: seconds that they take.
        wrapped: in the vendor's older form.
        files_url: where files are, with a slash at the end.
    """

    request: ImageRequest
    images: int
    latency: float
    wrapped: bool
    files_url: str


async def json_parts(answer: Answer, settings: Settings, studio: Studio) -> AsyncGenerator[bytes]:
    """The answer as one JSON object; the first part comes after the latency, with the first image in it."""
    await asyncio.sleep(answer.latency)
    before, after = (
        ('{"status": "SUCCESS", "message": "success", "data": ', "}") if answer.wrapped else ("", "")
    )
    facts = json.dumps({"created": int(time.time()), **facts_of(answer.request)})[:-1]
    usage = usage_of(answer.request, answer.images)
    counted = f', "usage": {json.dumps(usage)}' if usage else ""
    part = f'{before}{facts}, "data": ['.encode()
    for index in range(answer.images):
        yield part + await _item(answer, index, settings, studio)
        part = b", "
    yield (b"" if answer.images else part) + f"]{counted}}}{after}".encode()


async def event_parts(answer: Answer, settings: Settings, studio: Studio) -> AsyncGenerator[bytes]:
    """The answer as server-sent events, each one part; the latency is spread over them."""
    request = answer.request
    pause = answer.latency / max(1, answer.images * (request.partial_images + 1))
    for index in range(answer.images):
        for number, blocks in enumerate(_BLOCKS[: request.partial_images]):
            await asyncio.sleep(pause)
            encoded = await studio.base64(picture_of(request, index, settings, blocks))
            yield _event("image_generation.partial_image", request, encoded, partial_image_index=number)
        await asyncio.sleep(pause)
        encoded = await studio.base64(picture_of(request, index, settings))
        yield _event("image_generation.completed", request, encoded, usage=usage_of(request, 1))


def _event(kind: str, request: ImageRequest, encoded: bytes, **more: Any) -> bytes:
    fields = {"type": kind, "created_at": int(time.time()), **facts_of(request), **more}
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _with_base64(fields, encoded))


async def _item(answer: Answer, index: int, settings: Settings, studio: Studio) -> bytes:
    picture = picture_of(answer.request, index, settings)
    revised = revised_prompt_of(answer.request)
    fields = {"revised_prompt": revised} if revised else {}
    if _as_base64(answer.request, index, settings):
        return _with_base64(fields, await studio.base64(picture))
    return json.dumps({"url": answer.files_url + studio.file_for(picture)} | fields).encode()


def _as_base64(request: ImageRequest, index: int, settings: Settings) -> bool:
    return {
        "model": is_gpt(request) or request.response_format == "b64_json",
        "b64": True,
        "url": False,
        "mixed": index % 2 == 0,
    }[settings.items]


def _with_base64(fields: dict[str, Any], encoded: bytes) -> bytes:
    """JSON of the fields and `b64_json`; by hand, because json.dumps would search megabytes for escapes."""
    others = json.dumps(fields)[1:-1].encode()
    return b"".join((b'{"b64_json": "', encoded, b'", ' if others else b'"', others, b"}"))
