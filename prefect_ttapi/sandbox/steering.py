"""What a prompt may tell the sandbox, so that an example can show a failure at a certain row.

    [[sandbox:status=402]]    fail in this way; any name of `failures`, e.g. status=timeout
    [[sandbox:moderation]]    the same, shorter, for failures whose name is a word
    [[sandbox:times=2]]       fail only the first two times that this request arrives
    [[sandbox:latency=2.5]]   take this many seconds
    [[sandbox:images=1]]      give at most this many images
    [[sandbox:wrapped]]       answer in the vendor's older form, {"status": "SUCCESS", "data": {...}}

A real API takes it for part of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefect_ttapi.sandbox.failures import FAILURES, LOST, checked_name

_DIRECTIVE: Final = re.compile(r"\[\[sandbox:([^\]=]*)=?([^\]]*)\]\]")
_LONGEST: Final = 600.0  # seconds


@dataclass(frozen=True)
class Steering:
    """What a prompt asks of the sandbox; None where it says nothing."""

    status: str | None = None
    times: int | None = None
    latency: float | None = None
    images: int | None = None
    wrapped: bool = False


def _seconds(value: str) -> float:
    if not 0 <= float(value) <= _LONGEST:
        raise ValueError(f"seconds go from 0 to {_LONGEST:.0f}")
    return float(value)


def _whole(value: str) -> int:
    if not value.isdecimal() or len(value) > 9:
        raise ValueError("it takes a whole number")
    return int(value)


_READERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "status": checked_name,
    "times": _whole,
    "latency": _seconds,
    "images": _whole,
    "wrapped": lambda value: value == "",
}
_WORDS: Final = [name for name in (*FAILURES, *LOST) if name.isalpha()]


def steering_of(prompt: str) -> Steering:
    """What `prompt` asks of the sandbox.

    >>> steering_of("a cat [[sandbox:status=503]] [[sandbox:times=1]]")
    Steering(status='503', times=1, latency=None, images=None, wrapped=False)

    Raises:
        ValueError: it asks for what the sandbox does not know.
    """
    found: dict[str, Any] = {}
    for name, value in _DIRECTIVE.findall(prompt):
        if name in _WORDS and not value:
            found["status"] = name
        elif name in _READERS:
            try:
                found[name] = _READERS[name](value)
            except ValueError as error:
                raise ValueError(f"[[sandbox:{name}={value[:40]}]]: {error}") from None
        else:
            known = ", ".join([*_READERS, *_WORDS])
            raise ValueError(f"the sandbox knows no [[sandbox:{name[:40]}]]; it knows {known}")
    return Steering(**found)
