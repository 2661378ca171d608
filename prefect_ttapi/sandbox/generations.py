"""POST /v1/images/generations, as the sandbox answers it."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox.answers import request_of
from prefect_ttapi.sandbox.bodies import Answer, event_parts, json_parts
from prefect_ttapi.sandbox.counters import Counters
from prefect_ttapi.sandbox.failures import FAILURES, Failure, Refused, written
from prefect_ttapi.sandbox.settings import Settings, fate
from prefect_ttapi.sandbox.steering import Steering, steering_of
from prefect_ttapi.sandbox.studio import Studio

#: Longest body that is read, bytes; the longest legal prompt, escaped, is 400 kB.
_LONGEST_BODY: Final = 1024 * 1024
_PIECE: Final = 256 * 1024  # bytes


class Generations:
    """The endpoint. An ASGI application, so that a call is in flight until all of its answer is sent."""

    def __init__(self, settings: Settings, counters: Counters, studio: Studio) -> None:
        self._settings = settings
        self._counters = counters
        self._studio = studio
        self._at_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._counters.arrived() as number:
            headers = {"x-request-id": f"req-{number}"}
            try:
                await self._answer(Request(scope, receive), send, headers)
            except Refused as refused:
                response = Response(**written(refused.failure))
                response.headers.update(headers)
                await response(scope, receive, send)
            except ClientDisconnect:
                return  # nobody is left to hear an answer

    async def _answer(self, http: Request, send: Send, headers: dict[str, str]) -> None:
        request = request_of(await self._read(http))
        steering = _steering(request)
        call = self._counters.count_request(request.request_hash)
        chance = fate(self._settings, request.request_hash, call)
        latency = chance.latency if steering.latency is None else steering.latency
        steered = steering.status if steering.times is None or call <= steering.times else None
        ending = steered or chance.failure
        failure = FAILURES.get(ending or "")
        if failure:
            await asyncio.sleep(latency if failure.after_work else 0)
            raise Refused(failure)
        if ending == "hang":
            await _until_disconnected(http)
            return
        images = request.n if steering.images is None else min(request.n, steering.images)
        files_url = f"{http.url.scheme}://{http.url.netloc}{http.scope.get('root_path', '')}/files/"
        answer = Answer(request, images, latency, steering.wrapped, files_url)
        with self._at_work_on_one_more():
            await self._send_images(answer, send, headers, cut=ending == "cut")

    @contextmanager
    def _at_work_on_one_more(self) -> Iterator[None]:
        if self._settings.room is not None and self._at_work >= self._settings.room:
            raise Refused(FAILURES["429"])
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    async def _send_images(self, answer: Answer, send: Send, headers: dict[str, str], *, cut: bool) -> None:
        streaming = answer.request.stream
        make_parts = event_parts if streaming else json_parts
        parts = make_parts(answer, self._settings, self._studio)
        media_type = "text/event-stream" if streaming else "application/json"
        async with aclosing(parts):
            first = await anext(parts, b"")
            self._counters.count_paid(answer.request.request_hash, answer.images)
            start = Response(media_type=media_type, headers=headers)
            del start.headers["content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": start.raw_headers})
            if cut:  # returning before the end makes the server close the connection
                await _send_part(send, first[: len(first) // 2])
                return
            await _send_part(send, first)
            async for part in parts:
                await _send_part(send, part)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _read(self, http: Request) -> object:
        """The parsed body of a request with a right key."""
        body = bytearray()
        async for chunk in http.stream():
            if len(body) <= _LONGEST_BODY:
                body += chunk  # what is beyond is read and dropped: a client that still sends hears nothing
        self._check_key(http)
        if len(body) > _LONGEST_BODY:
            raise Refused(FAILURES["413"])
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(Failure(400, "openai", "The body is no JSON.", "invalid_json")) from None
        if isinstance(parsed, dict):
            self._counters.requests.append(parsed)
        return parsed

    def _check_key(self, http: Request) -> None:
        key = http.headers.get("tt-api-key") or http.headers.get("authorization", "").removeprefix("Bearer ")
        right = self._settings.api_key
        if not key or (right is not None and not hmac.compare_digest(key.encode(), right.encode())):
            raise Refused(FAILURES["401"])


def _steering(request: ImageRequest) -> Steering:
    try:
        return steering_of(request.prompt)
    except ValueError as error:
        raise Refused(Failure(400, "openai", str(error), "invalid_value", "prompt")) from None


async def _until_disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _send_part(send: Send, part: bytes) -> None:
    """Send in pieces, so that slow readers hold up the sender instead of filling its memory."""
    for start in range(0, len(part), _PIECE):
        piece = part[start : start + _PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
