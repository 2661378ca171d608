"""The sandbox as a context manager: an ASGI application, and uvicorn in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakSet

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router

from prefect_ttapi.origins import SANDBOX_PATH
from prefect_ttapi.sandbox.behaviour import FAILURES, Behaviour, Failure, written
from prefect_ttapi.sandbox.endpoint import Counters, Endpoint
from prefect_ttapi.sandbox.pictures import Studio

log: Final = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Sandbox(Behaviour, Counters):
    """Serves the images endpoint with placeholder pictures while its context is open, and counts.

    Besides the options of `Behaviour` it takes

    Attributes:
        host: address to listen at.
        port: 0 is any free one.

    Raises:
        ValueError: an argument is out of range.
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
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.create_server((self.host, self.port), family=family, backlog=1024)
        # told from its descriptor, the socket knows that it is TCP: asyncio turns Nagle's 40 ms off only then
        self._listener = _Listener(fileno=bound.detach())
        self._port = self._listener.getsockname()[1]
        studio = Studio(self.image_bytes)
        self._server = uvicorn.Server(
            uvicorn.Config(
                _app(Endpoint(self, self, studio), self, studio),
                http="h11", ws="none", lifespan="off", loop="asyncio",
                # a cut connection is an error to uvicorn, and its own log would say so
                log_config=None, log_level="critical", access_log=False,
                timeout_keep_alive=75, timeout_graceful_shutdown=0,
            )
        )  # fmt: skip
        # the socket listens already: who connects before the server runs waits in its queue
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="sandbox")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.cut()
        self._server.should_exit = True
        self._thread.join()

    @property
    def base_url(self) -> str:
        """Return what `TTAPI_BASE_URL` is to be; its answers are filed under one origin, whatever the port."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}{SANDBOX_PATH}"


class _Listener(socket.socket):
    """Knows its connections, so that whoever still waits for an answer can lose them."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self._connections: WeakSet[socket.socket] = WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = False

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        self._loop = asyncio.get_running_loop()
        self._connections.add(connection)
        if self._ended:
            self._cut_all()
        return connection, address

    def cut(self) -> None:
        """Cut all connections, those to come as well; called from another thread."""
        self._ended = True
        if self._loop:
            self._loop.call_soon_threadsafe(self._cut_all)

    def _cut_all(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):  # the other side was quicker
                connection.shutdown(socket.SHUT_RDWR)


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
