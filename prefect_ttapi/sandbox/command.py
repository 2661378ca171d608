"""The subcommand `sandbox`: serve a stand-in for the API until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable
from typing import Final

from prefect_ttapi.origins import is_loopback
from prefect_ttapi.sandbox.behaviour import FAILURES, ITEMS, LOST, checked_name, latency_range
from prefect_ttapi.sandbox.server import Sandbox

_EXAMPLE = "e.g. --fail 429:0.1 --fail cut:0.01"


def _whole(least: int, most: int, what: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 12 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
        return int(text)

    return read


_PORT: Final = _whole(0, 65_535, "port from 0 to 65535")
_BYTES: Final = _whole(1, 2**30, "number of bytes up to 1 GiB")
_ROOM: Final = _whole(1, 10**6, "number of calls from 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sandbox`."""
    parser.epilog = (
        "A prompt can steer it, e.g. with [[sandbox:status=402]]: see prefect_ttapi.sandbox.behaviour."
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    add("--port", type=_PORT, default=8787, help="port; 0 is any free one (default: %(default)s)")
    add("--latency", type=_latency, default="0", metavar="SECONDS", help="for images, e.g. 2 or 0.5-1.5")
    add("--fail", type=_rate, action="append", default=[], metavar="NAME:RATE",
        help=f"{_EXAMPLE}; names: {', '.join([*FAILURES, *LOST])}")  # fmt: skip
    add("--seed", type=int, default=0, help="another seed gives other pictures, latencies and failures")
    add("--api-key", metavar="KEY", help="accept only this key (default: any)")
    add("--items", choices=ITEMS, default="model", help="how images come (default: as the vendor says)")
    add("--tiny", action="store_true", help="draw at most 64 pixels a side, whatever was asked")
    add("--image-bytes", type=_BYTES, metavar="N", help="fill each PNG up to this length")
    add("--room", type=_ROOM, metavar="N", help="work on this many calls at once; further ones get 429")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    options = vars(arguments)
    names = ("host", "port", "latency", "seed", "api_key", "items", "tiny", "image_bytes", "room")
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with Sandbox(fail=dict(arguments.fail), **{name: options[name] for name in names}) as sandbox:
            key = "sandbox" if arguments.api_key is None else "the key that --api-key says"
            print(f"The sandbox draws placeholder pictures at {sandbox.base_url}; stop it with Ctrl-C.")
            if not is_loopback(arguments.host):
                print("Anyone who reaches this machine can use it.")
            print(f"\n  export TTAPI_BASE_URL={sandbox.base_url}\n  export TTAPI_API_KEY={key}\n", flush=True)
            stop.wait()
        print(f"{sandbox.calls} calls, {sandbox.paid} of them answered with images.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _latency(text: str) -> tuple[float, float]:
    try:
        return latency_range(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition(":")
    try:
        return checked_name(name), float(rate)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} ({_EXAMPLE}): {error}") from None
