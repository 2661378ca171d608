"""The subcommand `sandbox`: serve a stand-in for the API until Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

from prefect_ttapi.origins import is_loopback
from prefect_ttapi.sandbox.server import Sandbox

_EXAMPLE = "e.g. --fail 429:0.1 --fail cut:0.01"


def serve(fail: Iterable[str], **options: Any) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        fail: failures with their rates, as `429:0.1`.
        options: of the sandbox, which says itself which values are out of range.
    """
    ends = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # the server's threads inherit it
    try:
        with Sandbox(fail=dict(map(_rate, fail)), **options) as sandbox:
            key = "sandbox" if sandbox.api_key is None else "the key that --api-key says"
            print(f"The sandbox draws placeholder pictures at {sandbox.base_url}; stop it with Ctrl-C.")
            if not is_loopback(sandbox.host):
                print("Anyone who reaches this machine can use it.")
            print(f"\n  export TTAPI_BASE_URL={sandbox.base_url}\n  export TTAPI_API_KEY={key}\n", flush=True)
            signal.sigwait(ends)
        print(f"{sandbox.calls} calls, {sandbox.paid} of them answered with images.")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition(":")
    try:
        return name, float(rate)
    except ValueError:
        raise ValueError(f"{text!r} is no failure with its rate, {_EXAMPLE}") from None
