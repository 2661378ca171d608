"""Two hosts and a network of their own, whose cables can be pulled: network namespaces, a bridge, relays to services.

A host has its own process ids and name, too, so that nobody on the other one can tell whether its processes live.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

#: Of the range for tests between networks (RFC 2544), which nobody's route leads to.
NETWORK = "198.18.253"
BRIDGE = "ttapi-bridge"


class NotPermittedError(Exception):
    """This process can't make network namespaces; the message says what was refused."""


@dataclass(frozen=True)
class Host:
    """A namespace, which is named like the bridge's end of its cable."""

    name: str

    @property
    def prefix(self) -> list[str]:
        """What a command begins with that runs there; whatever it starts ends with it."""
        named = f'hostname {self.name} && exec "$@"'
        own = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        return ["ip", "netns", "exec", self.name, *own, "sh", "-c", named, "sh"]

    def cut_off(self) -> None:
        """Pull its cable: what is sent from now on gets nowhere, and nobody is told."""
        _ip("link", "set", self.name, "down")

    def come_back(self) -> None:
        """Plug its cable in again."""
        _ip("link", "set", self.name, "up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts that reach this machine at `NETWORK`.1, and nothing else.

    Raises:
        NotPermittedError: that takes root's rights, and namespaces, which some containers forbid.
    """
    with ExitStack() as made:
        _make(made, ("link", "add", BRIDGE, "type", "bridge"), ("link", "del", BRIDGE))
        _ip("address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        hosts = Host("ttapi-a"), Host("ttapi-b")
        for number, host in enumerate(hosts, start=2):
            _make(made, ("netns", "add", host.name), ("netns", "del", host.name))
            cable = ("link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _make(made, cable, ("link", "del", host.name))
            _ip("link", "set", host.name, "master", BRIDGE, "up")
            _ip("-n", host.name, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", device, "up")
        _try([*hosts[0].prefix, "true"])
        yield hosts


def _make(made: ExitStack, order: tuple[str, ...], undo: tuple[str, ...]) -> None:
    _ip(*order)
    made.callback(subprocess.run, ["ip", *undo], capture_output=True, timeout=60)


def _ip(*words: str) -> None:
    _try(["ip", *words])


def _try(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise NotPermittedError(f"{' '.join(command)}: {said.strip()}") from error


class Relay:
    """A service of this machine's loopback, at an address of the network; which one it is can change.

    Attributes:
        url: where the hosts find it, without a path.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        with socket.create_server((f"{NETWORK}.1", 0)) as free:
            self._address = free.getsockname()
        self.url = "{}://{}:{}".format("https" if tls else "http", *self._address)
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    @contextmanager
    def running(self) -> Iterator[Relay]:
        """In a thread of its own; it leads nowhere yet."""
        thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.lead_to(None)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def lead_to(self, port: int | None) -> None:
        """Cut what is open; new connections lead to this port of 127.0.0.1, or are refused."""
        asyncio.run_coroutine_threadsafe(self._lead_to(port), self._loop).result(60)

    async def _lead_to(self, port: int | None) -> None:
        if self._server:
            self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        self._server = None
        if port is not None:
            passing_on = partial(self._pass_on, port)
            self._server = await asyncio.start_server(passing_on, *self._address, ssl=self._tls)

    async def _pass_on(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        writers = [writer]
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            writers.append(back)
            await asyncio.gather(_copy(reader, back), _copy(there, writer))
        except OSError:
            writer.close()  # nobody is there
        except asyncio.CancelledError:  # asyncio complains of a connection whose task is cancelled
            for one in writers:
                one.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()  # that ends the other direction, too
