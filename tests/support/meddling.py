"""A proxy in front of a real service that meddles with chosen requests: real HTTP, real lost answers."""

from __future__ import annotations

import http.client
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

#: What to do with a request besides forwarding it: answer with a status, or with status, headers and body; replace
#: headers of the answer (None: leave it out); make another answer of it; or a word.
Answer = tuple[int, dict[str, str], bytes]
Order = str | int | Answer | dict[str, str | None] | Callable[[Answer], Answer] | None

#: Given method, path and headers (which may be changed); what to do.
Meddle = Callable[[str, str, dict[str, str]], Order]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds a body back for 40 ms
    server: Any

    def _meddled(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = dict(self.headers.items())
        self.server.seen.append((self.command, self.path))
        order = self.server.meddle(self.command, self.path, headers)
        if isinstance(order, int):  # answer with this status, without forwarding
            self._answer(order, {}, b"")
        elif isinstance(order, tuple):
            self._answer(*order)
        elif order == "swallow":  # neither forward nor answer
            self.close_connection = True
        else:
            sent = _altered(body) if order == "alter the body" else body
            status, answer_headers, answer = self._forward(headers, sent)
            if order == "lose the answer":
                self.close_connection = True
            else:
                told = _altered(answer) if order == "alter the answer" else answer
                replaced = order if isinstance(order, dict) else {}
                if callable(order):
                    status, answer_headers, told = order((status, answer_headers, told))
                self.close_connection = order == "cut the answer short"
                self._answer(
                    status, answer_headers | replaced, told, len(told) // 2 if self.close_connection else None
                )

    def _forward(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server.target)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        self.send_header("Date", headers.get("Date") or self.date_time_string())
        length = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
        dropped = {"content-length", "connection", "transfer-encoding", "date", "server"}
        for name, value in headers.items():
            if name.lower() not in dropped and value is not None:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _meddled  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _altered(body: bytes) -> bytes:
    """The same length, with one bit of its middle byte flipped."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what some tests are about."""


@contextmanager
def meddling_proxy(target: str, meddle: Meddle, tls: ssl.SSLContext | None = None) -> Iterator[_Proxy]:
    """A proxy to `target`, spoken to over TLS if asked; its `url`, and in `seen` the requests it got."""
    parts = urlsplit(target)
    server: Any = _Proxy(("127.0.0.1", 0), _Handler)
    server.target, server.meddle, server.seen = (parts.hostname, parts.port), meddle, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    if tls:  # each connection shakes hands in its own thread
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.url = f"https://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
