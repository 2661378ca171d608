"""The sandbox as a context manager and as a subcommand: an ASGI application, and uvicorn in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router

from prefect_ttapi.origins import SANDBOX_PATH, is_loopback
from prefect_ttapi.sandbox.behaviour import FAILURES, Behaviour, Failure, written
from prefect_ttapi.sandbox.endpoint import Counters, Endpoint
from prefect_ttapi.sandbox.pictures import Studio, signer_for_testing

log: Final = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Sandbox(Behaviour, Counters):
    """Serve the images endpoint with placeholder pictures while the context is open, and count.

    Besides the options of `Behaviour` it takes

    Attributes:
        host: address to listen at.
        port: 0 is any free one.

    Raises:
        ValueError: an argument is out of range; on entering, Content Credentials need an extra that is not installed.
        OSError: nothing can listen at host and port; raised on entering.
    """

    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        Counters.__init__(self)
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port goes from 0 to 65535, not {self.port}")

    def __enter__(self) -> Sandbox:
        signer = signer_for_testing() if self.content_credentials else None
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.create_server((self.host, self.port), family=family, backlog=1024)
        # told from its descriptor, the socket knows that it is TCP: asyncio turns Nagle's 40 ms off only then
        listener = socket.socket(fileno=bound.detach())
        self._port = listener.getsockname()[1]
        studio = Studio(self.image_bytes, signer)
        self._server = _Server(
            uvicorn.Config(
                _app(Endpoint(self, self, studio), self, studio),
                http="h11", ws="none", lifespan="off", loop="asyncio",
                # a cut connection is an error to uvicorn, and its own log would say so
                log_config=None, log_level="critical", access_log=False,
                timeout_keep_alive=75, timeout_graceful_shutdown=0,
            )
        )  # fmt: skip
        # the socket listens already: who connects before the server runs waits in its queue
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="sandbox")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def base_url(self) -> str:
        """Return what `TTAPI_BASE_URL` is to be; its answers are filed under one origin, whatever the port."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}{SANDBOX_PATH}"


class _Server(uvicorn.Server):
    """A server that cuts its connections as it ends: whoever still waits for an answer loses it."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)


def _app(endpoint: Endpoint, counters: Counters, studio: Studio) -> Starlette:
    """Return the application; it answers at the root and under `SANDBOX_PATH` alike."""

    async def file(request: Request) -> Response:
        picture = studio.files.get(request.path_params["name"])
        if picture is None:
            raise HTTPException(404)
        content = await asyncio.to_thread(studio.made, picture)
        return Response(content, media_type=f"image/{picture.request.output_format}")

    async def stats(_request: Request) -> Response:
        return JSONResponse(counters.as_json())

    routes = [
        Route("/v1/images/generations", endpoint, methods=["POST"]),
        Route("/files/{name}", file),
        Route("/stats", stats),
    ]
    app = Starlette(
        routes=[Mount(SANDBOX_PATH, Router(routes, redirect_slashes=False)), *routes],
        exception_handlers={HTTPException: _no_such_route, Exception: _our_fault},
    )
    app.router.redirect_slashes = False
    return app


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - for the type checker: it is registered for these
    message = f"{error.detail}: {request.method} {request.url.path}"
    return written(Failure(error.status_code, "openai", message, headers=error.headers or {}))


async def _our_fault(_request: Request, error: Exception) -> Response:
    log.error("the sandbox itself failed", exc_info=error)
    return written(FAILURES["500"])


def serve(fail: Iterable[str], **options: Any) -> None:
    """Serve until SIGINT or SIGTERM: the subcommand `sandbox`.

    Args:
        fail: failures with their rates, as `429:0.1`.
        options: of the sandbox, which says itself which values are out of range.
    """
    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # the server's threads inherit it
    try:
        with Sandbox(fail=dict(map(_rate, fail)), **options) as sandbox:
            key = "sandbox" if sandbox.api_key is None else "the key that --api-key says"
            print(f"The sandbox draws placeholder pictures at {sandbox.base_url}; stop it with Ctrl-C.")
            if not is_loopback(sandbox.host):
                print("Anyone who reaches this machine can use it.")
            print(f"\n  export TTAPI_BASE_URL={sandbox.base_url}\n  export TTAPI_API_KEY={key}\n", flush=True)
            signal.sigwait(ends)
        print(f"{sandbox.calls} calls, {sandbox.paid} of them answered with images.")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition(":")
    try:
        return name, float(rate)
    except ValueError:
        raise ValueError(
            f"{text!r} is no failure with its rate, e.g. --fail 429:0.1 --fail cut:0.01"
        ) from None
