"""The sandbox as an ASGI application: the paid endpoint, the files its URLs lead to, and the counters."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router

from prefect_ttapi.origins import SANDBOX_PATH
from prefect_ttapi.sandbox.counters import Counters
from prefect_ttapi.sandbox.failures import FAILURES, Failure, written
from prefect_ttapi.sandbox.generations import Generations
from prefect_ttapi.sandbox.settings import Settings
from prefect_ttapi.sandbox.studio import Studio

_LOGGER = logging.getLogger(__name__)


def make_app(settings: Settings, counters: Counters, studio: Studio) -> Starlette:
    """The application; it answers at the root and under `SANDBOX_PATH` alike."""

    async def file(request: Request) -> Response:
        found = await studio.file(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        content, media_type = found
        return Response(content, media_type=media_type)

    async def stats(_request: Request) -> Response:
        return JSONResponse(counters.as_json())

    routes = [
        Route("/v1/images/generations", Generations(settings, counters, studio), methods=["POST"]),
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
    failure = Failure(error.status_code, "openai", message, headers=error.headers or {})
    return Response(**written(failure))


async def _our_fault(_request: Request, error: Exception) -> Response:
    _LOGGER.error("the sandbox itself failed", exc_info=error)
    return Response(**written(FAILURES["500"]))
