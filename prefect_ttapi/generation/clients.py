"""One API client per credentials and process: tasks in threads share its connections."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Hashable

from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.wire.client import TTAPIClient

_LOCK = threading.Lock()
_CLIENTS: dict[Hashable, TTAPIClient] = {}


def shared_client(credentials: TTAPICredentials) -> TTAPIClient:
    """The process's client for these credentials; it is closed when the process ends."""
    settings = tuple(getattr(credentials, name) for name in TTAPICredentials.model_fields)
    with _LOCK:
        if settings not in _CLIENTS:
            _CLIENTS[settings] = credentials.get_client()
        return _CLIENTS[settings]


@atexit.register
def _close() -> None:
    with _LOCK:
        for client in _CLIENTS.values():
            client.close()
        _CLIENTS.clear()


# connections must not be shared with a child process
os.register_at_fork(after_in_child=_CLIENTS.clear)
