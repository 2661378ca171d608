"""POST /v1/images/generations, as the sandbox answers it, and what it counts."""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefect_ttapi.sandbox.answers import Answer, request_of
from prefect_ttapi.sandbox.behaviour import FAILURES, Behaviour, Refused, fate_of, told_by, written
from prefect_ttapi.sandbox.pictures import Studio

#: Longest body that is read, bytes; the longest legal prompt, escaped, is 400 kB.
_LONGEST_BODY: Final = 1024 * 1024
_PIECE: Final = 256 * 1024  # bytes
_REQUESTS_KEPT: Final = 1000
_COUNTED = ("calls", "paid", "images", "in_flight", "most_in_flight", "calls_by_request", "paid_by_request")


class Counters:
    """Counts since the start or the last reset; safe to read from other threads.

    Attributes:
        calls: generation requests that reached the endpoint, whatever became of them.
        paid: calls that were answered with images, whether or not the answer arrived.
        images: images in the answers of the paid calls.
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
            self.calls = self.paid = self.images = 0
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

    def count_paid(self, request_hash: str, images: int) -> None:
        """Count a call whose images were made."""
        with self._lock:
            self.paid += 1
            self.images += images
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
        try:
            told = told_by(request.prompt)
        except ValueError as error:
            raise Refused.for_request(str(error), "prompt") from None
        call = self._counters.count_request(request.request_hash)
        fate = fate_of(told, request.request_hash, call, self._behaviour)
        if failure := FAILURES.get(fate.failure or ""):
            await asyncio.sleep(fate.latency if failure.after_work else 0)
            raise Refused(failure)
        if fate.failure == "hang":
            while (await http.receive())["type"] != "http.disconnect":
                pass
            return
        files_url = f"{http.url.scheme}://{http.url.netloc}{http.scope.get('root_path', '')}/files/"
        images = min(request.n, told.images)
        answer = Answer(request, images, fate.latency, told.wrapped, files_url, self._behaviour, self._studio)
        if self._room.locked():
            raise Refused(FAILURES["429"])
        async with self._room:
            await self._send_images(answer, send, headers, cut=fate.failure == "cut")

    async def _send_images(self, answer: Answer, send: Send, headers: dict[str, str], *, cut: bool) -> None:
        streaming = answer.request.stream
        media_type = "text/event-stream" if streaming else "application/json"
        async with aclosing(answer.as_events() if streaming else answer.as_json()) as parts:
            first = await anext(parts, b"")
            self._counters.count_paid(answer.request.request_hash, answer.images)
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
