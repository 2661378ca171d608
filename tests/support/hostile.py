"""A server on raw sockets that does what it is told: answer, cut, drip, stall, reset, lie about lengths.

    with HostileServer(answer(503), answer(200, body)) as server:
        ...
    server.requests  # what it received: complete requests only

The n-th request, over all connections, gets the n-th behaviour; the last behaviour repeats.
"""

from __future__ import annotations

import base64
import contextlib
import json
import select
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from tests.support.pictures import png_of

#: What clients of this server send as their API key.
KEY = "tt-MARKED-key-0123456789"


@dataclass
class Received:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Wire:
    """One connection, as a behaviour sees it."""

    sock: socket.socket
    request: Received

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait(self, seconds: float) -> None:
        """Wait, but not for a client that hung up."""
        select.select([self.sock], [], [], seconds)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


#: Returns whether the connection stays open for another request.
Behaviour = Callable[[Wire], bool]


def head(status: int, headers: Mapping[str, str] | None = None, reason: str = "Whatever") -> bytes:
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{k}: {v}" for k, v in (headers or {}).items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def as_bytes(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def answer(status: int = 200, body: object = b"", headers: Mapping[str, str] | None = None) -> Behaviour:
    """A complete, honest answer; the connection is kept."""

    def behave(wire: Wire) -> bool:
        data = as_bytes(body)
        wire.send(head(status, {"Content-Length": str(len(data)), **(headers or {})}) + data)
        return True

    return behave


def raw(*pieces: bytes, pause: float = 0.0, reset: bool = False) -> Behaviour:
    """These bytes, as they are, then the end of the connection."""

    def behave(wire: Wire) -> bool:
        for piece in pieces:
            wire.send(piece)
            wire.wait(pause)
        if reset:
            wire.reset()
        return False

    return behave


def close() -> Behaviour:
    """No answer at all."""
    return raw()


def reset() -> Behaviour:
    return raw(reset=True)


def cut(body: object, at: int, *, reset: bool = False, headers: Mapping[str, str] | None = None) -> Behaviour:
    """The honest length, but only the first `at` bytes."""
    data = as_bytes(body)
    return raw(head(200, {"Content-Length": str(len(data)), **(headers or {})}) + data[:at], reset=reset)


def stall(*pieces: bytes, seconds: float = 30.0) -> Behaviour:
    """These bytes, then silence with the connection open."""

    def behave(wire: Wire) -> bool:
        for piece in pieces:
            wire.send(piece)
        wire.wait(seconds)
        return False

    return behave


def drip(data: bytes, size: int = 1, pause: float = 0.0) -> Behaviour:
    """A complete answer, `size` bytes at a time."""
    whole = head(200, {"Content-Length": str(len(data))}) + data
    return raw(*(whole[i : i + size] for i in range(0, len(whole), size)), pause=pause)


def then_close(behaviour: Behaviour) -> Behaviour:
    """As `behaviour`, then the connection is closed without having said so."""

    def behave(wire: Wire) -> bool:
        behaviour(wire)
        return False

    return behave


class HostileServer:
    def __init__(self, *behaviours: Behaviour, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.connections = 0
        self._behaviours = behaviours
        self._requests: list[Received] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._busy: dict[
            socket.socket, bool
        ] = {}  # open connections; whether something is being done with them
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        with self._lock:
            for sock in self._busy:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def play(self, *behaviours: Behaviour) -> None:
        """Forget what came so far, and behave like this from now on."""
        self._settle()
        self._behaviours, self._requests = behaviours, []

    @property
    def requests(self) -> list[Received]:
        """The complete requests since `play`, also those whose senders did not wait for an answer."""
        self._settle()
        return self._requests

    @property
    def open_connections(self) -> int:
        with self._lock:
            return len(self._busy)

    def _settle(self) -> None:
        deadline = time.monotonic() + 10
        while not self._is_settled() and time.monotonic() < deadline:
            time.sleep(0.001)

    def _is_settled(self) -> bool:
        with self._lock:
            if any(self._busy.values()):
                return False
            return not select.select([self._listener, *self._busy], [], [], 0)[0]

    def _accept(self) -> None:
        while True:
            select.select([self._listener], [], [])
            with self._lock:
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    return
                self.connections += 1
                self._busy[sock] = True
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                thread = threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True)
                self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, connection: int) -> None:
        try:
            with contextlib.suppress(OSError):
                if self.tls is not None:
                    sock = self._secured(sock, self.tls)
                    sock.do_handshake()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                keep = True
                while keep and (request := self._next(sock, connection)) is not None:
                    with self._lock:
                        self._requests.append(request)
                        behaviour = self._behaviours[min(len(self._requests), len(self._behaviours)) - 1]
                    keep = behaviour(Wire(sock, request))
        finally:
            with self._lock:
                del self._busy[sock]
            sock.close()

    def _secured(self, sock: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        secured = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._busy[secured] = self._busy.pop(sock)
        return secured

    def _next(self, sock: socket.socket, connection: int) -> Received | None:
        self._busy[sock] = False
        select.select([sock], [], [])
        self._busy[sock] = True
        return self._receive(sock, connection)

    @staticmethod
    def _receive(sock: socket.socket, connection: int) -> Received | None:
        data = b""
        while b"\r\n\r\n" not in data:
            chunk = sock.recv(65536)
            if not chunk:
                return None
            data += chunk
        top, _, body = data.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            chunk = sock.recv(65536)
            if not chunk:
                return None
            body += chunk
        method, path, _ = first.split(" ", 2)
        return Received(method, path, headers, body, connection)


def png(width: int = 16, height: int = 16, noise: int = 0) -> bytes:
    """A complete PNG; `noise` bytes of ballast make it larger."""
    pixels = zlib.compress(b"".join(b"\0" + b"\x40\x80\xc0" * width for _ in range(height)))
    ballast = {"baLl": bytes(i % 251 for i in range(noise))} if noise else {}
    return png_of(width, height, pixels, **ballast)


def b64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def answered(*images: bytes, **more: object) -> dict:
    """A usable answer's document."""
    return {"created": 1745818538, "data": [{"b64_json": b64(image)} for image in images], **more}
