"""The subcommand `sandbox`: serve a stand-in for the API until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
from dataclasses import fields

from prefect_ttapi.origins import is_loopback
from prefect_ttapi.sandbox.behaviour import FAILURES, ITEMS, LOST
from prefect_ttapi.sandbox.server import Sandbox

_EXAMPLE = "e.g. --fail 429:0.1 --fail cut:0.01"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sandbox`; the sandbox itself says which values are out of range."""
    parser.epilog = (
        "A prompt can steer it, e.g. with [[sandbox:status=402]]: see prefect_ttapi.sandbox.behaviour."
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    add("--port", type=int, default=8787, help="port; 0 is any free one (default: %(default)s)")
    add("--latency", default="0", metavar="SECONDS", help="for images, e.g. 2 or 0.5-1.5")
    add("--fail", type=_rate, action="append", default=[], metavar="NAME:RATE",
        help=f"{_EXAMPLE}; names: {', '.join([*FAILURES, *LOST])}")  # fmt: skip
    add("--seed", type=int, default=0, help="another seed gives other pictures, latencies and failures")
    add("--api-key", metavar="KEY", help="accept only this key (default: any)")
    add("--items", choices=ITEMS, default="model", help="how images come (default: as the vendor says)")
    add("--tiny", action="store_true", help="draw at most 64 pixels a side, whatever was asked")
    add("--image-bytes", type=int, metavar="N", help="fill each PNG up to this length")
    add("--room", type=int, metavar="N", help="work on this many calls at once; further ones get 429")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    options = {each.name: getattr(arguments, each.name) for each in fields(Sandbox)}
    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # the server's threads inherit it
    try:
        with Sandbox(**options | {"fail": dict(arguments.fail)}) as sandbox:
            key = "sandbox" if arguments.api_key is None else "the key that --api-key says"
            print(f"The sandbox draws placeholder pictures at {sandbox.base_url}; stop it with Ctrl-C.")
            if not is_loopback(arguments.host):
                print("Anyone who reaches this machine can use it.")
            print(f"\n  export TTAPI_BASE_URL={sandbox.base_url}\n  export TTAPI_API_KEY={key}\n", flush=True)
            signal.sigwait(ends)
        print(f"{sandbox.calls} calls, {sandbox.paid} of them answered with images.")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition(":")
    try:
        return name, float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no failure with its rate, {_EXAMPLE}") from None
