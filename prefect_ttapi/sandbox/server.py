"""The sandbox as a context manager: uvicorn in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from typing import Any

import uvicorn

from prefect_ttapi.origins import SANDBOX_PATH
from prefect_ttapi.sandbox.app import make_app
from prefect_ttapi.sandbox.counters import Counters
from prefect_ttapi.sandbox.settings import Items, Settings, latency_range
from prefect_ttapi.sandbox.studio import Studio


class Sandbox:
    """Serves the images endpoint with placeholder pictures while its context is open.

    Args:
        latency: seconds that images take; a range as `(0.5, 1.5)` or `"0.5-1.5"`.
        fail: rates of failures, 0 to 1, by HTTP status or name, e.g. `{429: 0.1, "cut": 0.01}`; the table is
            in `prefect_ttapi.sandbox.failures`.
        seed: another seed gives other pictures, latencies and failures; the same one repeats them.
        api_key: the only right key; None: any.
        items: `model` (as the vendor says), `b64`, `url` or `mixed`.
        tiny: draw at most 64 pixels a side, whatever was asked.
        image_bytes: length of each finished PNG, filled up with noise; None: as it comes.
        room: calls that are worked on at once; further ones get 429. None: any number.
        host: address to listen at.
        port: 0 is any free one.

    Raises:
        ValueError: an argument is out of range.
        OSError: nothing can listen at host and port; raised on entering.
    """

    def __init__(
        self,
        *,
        latency: float | str | tuple[float, float] = 0.0,
        fail: Mapping[int | str, float] | None = None,
        seed: int = 0,
        api_key: str | None = None,
        items: Items = "model",
        tiny: bool = False,
        image_bytes: int | None = None,
        room: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        rates = {str(name): rate for name, rate in (fail or {}).items()}
        self._settings = Settings(
            latency_range(latency), rates, seed, api_key, items, tiny, image_bytes, room
        )
        self._address = (host, port)
        self._counters = Counters()

    def __enter__(self) -> Sandbox:
        host, port = self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family, backlog=1024)
        # told from its descriptor, the socket knows that it is TCP: asyncio turns Nagle's 40 ms off only then
        listener = socket.socket(fileno=bound.detach())
        self._port = listener.getsockname()[1]
        self._studio = Studio(self._settings.image_bytes)
        self._server = _Server(
            uvicorn.Config(
                make_app(self._settings, self._counters, self._studio),
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
        self._studio.close()

    @property
    def base_url(self) -> str:
        """What `TTAPI_BASE_URL` is to be; its answers are filed under one origin, whatever the port."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._address[0], self._address[0])  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}{SANDBOX_PATH}"

    @property
    def calls(self) -> int:
        """Generation requests that reached the endpoint, whatever became of them."""
        return self._counters.calls

    @property
    def paid(self) -> int:
        """Calls that were answered with images, whether or not the answer arrived."""
        return self._counters.paid

    @property
    def images(self) -> int:
        """Images in the answers of the paid calls."""
        return self._counters.images

    @property
    def in_flight(self) -> int:
        """Calls that have arrived and are not yet wholly answered."""
        return self._counters.in_flight

    @property
    def most_in_flight(self) -> int:
        """The most calls in flight at once."""
        return self._counters.most_in_flight

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The latest bodies that were JSON objects, at most 1000, oldest first."""
        return list(self._counters.requests)

    @property
    def calls_by_request(self) -> dict[str, int]:
        """Calls by `ImageRequest.request_hash` of the body; only legal requests have one."""
        return dict(self._counters.calls_by_request)

    @property
    def paid_by_request(self) -> dict[str, int]:
        """Paid calls by `ImageRequest.request_hash` of the body."""
        return dict(self._counters.paid_by_request)

    def reset(self) -> None:
        """Count from zero; failures and latencies repeat from the start, too."""
        self._counters.reset()


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop at once: whoever still waits for an answer loses the connection."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)
