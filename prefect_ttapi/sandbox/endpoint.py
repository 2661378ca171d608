"""POST /v1/images/generations, as the sandbox answers it, part by part, and what it counts.

No more than one image is held at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefect_ttapi.capabilities import problems_of
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox.behaviour import FAILURES, Behaviour, Refused, fate_of, told_by, written
from prefect_ttapi.sandbox.pictures import Picture, Studio

#: Longest body that is read, bytes; the longest legal prompt, escaped, is 400 kB.
_LONGEST_BODY: Final = 1024 * 1024
_PIECE: Final = 256 * 1024  # bytes
_REQUESTS_KEPT: Final = 1000
_COUNTED: Final = (
    "calls", "paid", "images", "tokens", "in_flight", "most_in_flight", "calls_by_request", "paid_by_request",
)  # fmt: skip

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


class Counters:
    """Counts since the start or the last reset; safe to read from other threads.

    Attributes:
        calls: generation requests that reached the endpoint, whatever became of them.
        paid: calls that were answered with images, whether or not the answer arrived.
        images: images in the answers of the paid calls.
        tokens: what these answers took; DALL-E models take none.
        in_flight: calls that have arrived and are not yet wholly answered.
        most_in_flight: the most calls in flight at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.in_flight = 0
        self.reset()

    def reset(self) -> None:
        """Count from zero, as failures and latencies do; what is in flight stays in flight."""
        with self._lock:
            self.calls = self.paid = self.images = self.tokens = 0
            self.most_in_flight = self.in_flight
            self.bodies: deque[dict[str, Any]] = deque(maxlen=_REQUESTS_KEPT)
            self._calls_by_request: Counter[str] = Counter()
            self._paid_by_request: Counter[str] = Counter()

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Return the latest bodies that were JSON objects, at most 1000, oldest first."""
        return list(self.bodies)

    @property
    def calls_by_request(self) -> dict[str, int]:
        """Return calls by `ImageRequest.request_hash` of the body; only legal requests have one."""
        return dict(self._calls_by_request)

    @property
    def paid_by_request(self) -> dict[str, int]:
        """Return paid calls by `ImageRequest.request_hash` of the body."""
        return dict(self._paid_by_request)

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, of one moment; bodies are left out."""
        with self._lock:
            return {name: getattr(self, name) for name in _COUNTED}

    @contextmanager
    def arrived(self) -> Iterator[int]:
        """Count a call, and as in flight while the context is open; gives its number."""
        with self._lock:
            self.calls += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            number = self.calls
        try:
            yield number
        finally:
            with self._lock:
                self.in_flight -= 1

    def count_request(self, request_hash: str) -> int:
        """Count a legal request; gives how often it arrived, this time included."""
        with self._lock:
            self._calls_by_request[request_hash] += 1
            return self._calls_by_request[request_hash]

    def count_paid(self, request_hash: str, images: int, tokens: int) -> None:
        """Count a call whose images were made."""
        with self._lock:
            self.paid += 1
            self.images += images
            self.tokens += tokens
            self._paid_by_request[request_hash] += 1


class Endpoint:
    """The endpoint. An ASGI application, so that a call is in flight until all of its answer is sent."""

    def __init__(self, behaviour: Behaviour, counters: Counters, studio: Studio) -> None:
        self._behaviour = behaviour
        self._counters = counters
        self._studio = studio
        self._room = asyncio.Semaphore(behaviour.room or sys.maxsize)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        with self._counters.arrived() as number:
            headers = {"x-request-id": f"req-{number}"}
            try:
                await self._answer(Request(scope, receive), send, headers)
            except Refused as refused:
                response = written(refused.failure)
                response.headers.update(headers)
                await response(scope, receive, send)
            except ClientDisconnect:
                return  # nobody is left to hear an answer

    async def _answer(self, http: Request, send: Send, headers: dict[str, str]) -> None:
        request = request_of(await self._read(http))
        told = told_by(request.prompt)
        call = self._counters.count_request(request.request_hash)
        latency, end = fate_of(told, request.request_hash, call, self._behaviour)
        if failure := FAILURES.get(end or ""):
            await asyncio.sleep(latency if failure.after_work else 0)
            raise Refused(failure)
        if end == "hang":
            while (await http.receive())["type"] != "http.disconnect":
                pass
            return
        files_url = f"{http.url.scheme}://{http.url.netloc}{http.scope.get('root_path', '')}/files/"
        images = min(request.n, told.images)
        answer = Answer(request, images, latency, told.wrapped, files_url, self._behaviour, self._studio)
        if self._room.locked():
            raise Refused(FAILURES["429"])
        async with self._room:
            await self._send_images(answer, send, headers, cut=end == "cut")

    async def _send_images(self, answer: Answer, send: Send, headers: dict[str, str], *, cut: bool) -> None:
        streaming = answer.request.stream
        media_type = "text/event-stream" if streaming else "application/json"
        async with aclosing(answer.as_events() if streaming else answer.as_json()) as parts:
            first = await anext(parts, b"")
            self._counters.count_paid(answer.request.request_hash, answer.images, answer.tokens)
            start = Response(media_type=media_type, headers=headers)
            del start.headers["content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": start.raw_headers})
            await _send_part(send, first[: len(first) // 2] if cut else first)
            if cut:
                return  # before the end: that makes the server close the connection
            async for part in parts:
                await _send_part(send, part)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _read(self, http: Request) -> object:
        """Return the parsed body of a request with a right key."""
        body = bytearray()
        async for chunk in http.stream():
            if len(body) <= _LONGEST_BODY:
                body += chunk  # what is beyond is read and dropped: a client that still sends hears nothing
        key = http.headers.get("tt-api-key") or http.headers.get("authorization", "").removeprefix("Bearer ")
        right = self._behaviour.api_key
        if not key or (right is not None and not hmac.compare_digest(key.encode(), right.encode())):
            raise Refused(FAILURES["401"])
        if len(body) > _LONGEST_BODY:
            raise Refused(FAILURES["413"])
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused.for_request("The body is no JSON.", code="invalid_json") from None
        if isinstance(parsed, dict):
            self._counters.bodies.append(parsed)
        return parsed


async def _send_part(send: Send, part: bytes) -> None:
    """Send in pieces, so that slow readers hold up the sender instead of filling its memory."""
    for start in range(0, len(part), _PIECE):
        piece = part[start : start + _PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})


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
        first = ".".join(map(str, error.errors()[0]["loc"]))
        raise Refused.for_request("; ".join(problems_of(error)), first) from None
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

    @property
    def tokens(self) -> int:
        """How many tokens it takes; each image of a stream has its own."""
        each, times = (1, self.images) if self.request.stream else (self.images, 1)
        usage = _usage_of(self.request, each)
        return times * usage["total_tokens"] if usage else 0

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
