"""Ports of 127.0.0.1 for services that have to be told theirs."""

from __future__ import annotations

import socket
from contextlib import ExitStack


def free_ports(count: int) -> list[int]:
    """As many different ports at which nobody listens."""
    with ExitStack() as open_at_once:
        sockets = [open_at_once.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listening.getsockname()[1] for listening in sockets]
