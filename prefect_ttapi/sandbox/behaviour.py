"""How a sandbox behaves: its failures and options, chance that repeats itself, and what a prompt tells it to do.

Names of failures are the HTTP status, or a word where the status alone does not say it. They are used by
`--fail NAME:RATE`, by `Sandbox(fail={NAME: RATE})`, and in prompts.

A prompt can steer it, so that an example can show a failure at a certain row:

    [[sandbox:status=402]]    fail in this way; any name of `FAILURES` or `LOST`, e.g. status=timeout
    [[sandbox:moderation]]    the same, shorter, for failures whose name is a word
    [[sandbox:times=2]]       fail only the first two times that this request arrives
    [[sandbox:latency=2.5]]   take this many seconds
    [[sandbox:images=1]]      give at most this many images
    [[sandbox:wrapped]]       answer in the vendor's older form, {"status": "SUCCESS", "data": {...}}

A real API takes it for part of the prompt.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from starlette.responses import Response


@dataclass(frozen=True)
class Failure:
    """One way in which a call ends without its images.

    Attributes:
        status: of the HTTP answer.
        envelope: whose form the error has.
        message: for a person.
        code, param: of OpenAI's envelope.
        headers: sent with it.
        after_work: the answer comes only after the time that the images would have taken.
    """

    status: int
    envelope: Literal["vendor", "openai", "html"]
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after_work: bool = False


class Refused(Exception):  # noqa: N818 - an answer, not an error of ours
    """The call ends with `failure`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure

    @classmethod
    def for_request(cls, message: str, param: str | None = None, code: str = "invalid_value") -> Refused:
        """Return 400, as OpenAI says it, because of the field `param`."""
        return cls(Failure(400, "openai", message, code, param))


#: After these no answer arrives: "cut" loses the connection amid the images, "hang" stays silent.
LOST: Final = ("cut", "hang")

_SLOW_DOWN: Final = {"Retry-After": "1", "retry-after-ms": "200"}

FAILURES: Final[Mapping[str, Failure]] = {
    "400": Failure(400, "openai", "The sandbox was asked to refuse this request.", "invalid_value"),
    "moderation": Failure(
        400, "openai", "Your request was rejected by the safety system.", "moderation_blocked"
    ),
    "401": Failure(401, "vendor", "Invalid TT-API-KEY."),
    "402": Failure(402, "vendor", "Insufficient balance, please recharge."),
    "403": Failure(403, "vendor", "This account is blocked."),
    "404": Failure(404, "openai", "Not found.", "not_found"),
    "408": Failure(408, "vendor", "The request timed out.", after_work=True),
    "413": Failure(413, "openai", "The request body is too large.", "request_too_large"),
    "422": Failure(422, "vendor", "The request cannot be processed."),
    "425": Failure(425, "html", "Too Early"),
    "429": Failure(429, "openai", "Too many requests.", "rate_limit_exceeded", headers=_SLOW_DOWN),
    "499": Failure(499, "vendor", "The queue for this product is full."),
    "500": Failure(500, "openai", "The server had an error while processing your request.", "server_error"),
    "502": Failure(502, "html", "Bad Gateway"),
    "503": Failure(503, "vendor", "Service temporarily unavailable."),
    "504": Failure(504, "html", "Gateway Time-out", after_work=True),
    "520": Failure(520, "html", "Web server is returning an unknown error", after_work=True),
    "521": Failure(521, "html", "Web server is down"),
    "522": Failure(522, "html", "Connection timed out", after_work=True),
    "524": Failure(524, "html", "A timeout occurred", after_work=True),
    "insufficient_quota": Failure(
        429,
        "openai",
        "You exceeded your current quota, please check your plan and billing details.",
        "insufficient_quota",
    ),
    "no_credit": Failure(200, "vendor", "Insufficient balance, please recharge."),
    "model_not_permitted": Failure(
        403, "openai", "Your organization must be verified to use the model.", "model_not_permitted"
    ),
    "firewall": Failure(403, "html", "Sorry, you have been blocked"),
    "timeout": Failure(504, "vendor", "The task timed out.", after_work=True),
    "failed": Failure(200, "vendor", "The task failed.", after_work=True),
}


def checked_name(name: int | str) -> str:
    """Return the name of a failure.

    Raises:
        ValueError: there is no such failure; the message lists them.
    """
    known = [*FAILURES, *LOST]
    if str(name) not in known:
        raise ValueError(f"the sandbox knows no failure {str(name)[:40]!r}; it knows {', '.join(known)}")
    return str(name)


def written(failure: Failure) -> Response:
    """Return the failure as an HTTP response."""
    status, headers = failure.status, dict(failure.headers)
    if failure.envelope == "html":
        title = f"{status} {failure.message}"
        page = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"
        return Response(page, status, headers, "text/html")
    content: dict[str, Any]
    if failure.envelope == "vendor":
        content = {"status": "FAILED", "message": failure.message, "data": None}
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}
        content = {"error": error}
    # not JSONResponse, which fails on half a surrogate pair that a message repeats
    return Response(json.dumps(content), status, headers, "application/json")


Items = Literal["model", "b64", "url", "mixed"]
ITEMS: Final[tuple[str, ...]] = get_args(Items)

_MOST_BYTES: Final = 2**30


@dataclass(kw_only=True, eq=False)
class Behaviour:
    """The options of a sandbox.

    Attributes:
        latency: seconds that images take; a range as `(0.5, 1.5)` or `"0.5-1.5"`.
        fail: rates of failures, 0 to 1, by HTTP status or name, e.g. `{429: 0.1, "cut": 0.01}`.
        seed: another seed gives other pictures, latencies and failures.
        api_key: the only right key; None: any.
        items: `model`: DALL-E models by `response_format`, url by default, GPT Image models as base64, as the
            vendor says; `b64`, `url`: always; `mixed`: in turns within an answer, from base64.
        tiny: draw at most 64 pixels a side, whatever was asked: for measuring everything else.
        image_bytes: length of each finished PNG, filled up with noise, at most 1 GiB; None: as it comes.
        room: calls that are worked on at once; further ones get 429. None: any number.
        content_credentials: finished pictures have Content Credentials of a certificate that is made when the sandbox
            starts, for testing only; the same picture is never the same bytes then.

    Raises:
        ValueError: an option is out of range.
    """

    latency: float | str | tuple[float, float] = 0.0
    fail: Mapping[int | str, float] = field(default_factory=dict)
    seed: int = 0
    api_key: str | None = field(default=None, repr=False)
    items: Items = "model"
    tiny: bool = False
    image_bytes: int | None = None
    room: int | None = None
    content_credentials: bool = False

    def __post_init__(self) -> None:
        shortest, longest = latency_range(self.latency)
        if not 0 <= shortest <= longest < float("inf"):
            raise ValueError(f"latency goes from a shorter to a longer time in seconds, not {self.latency}")
        for name, rate in self.fail.items():
            checked_name(name)
            if not 0 <= rate <= 1:
                raise ValueError(f"the rate of {name} goes from 0 to 1, not {rate}")
        if sum(self.fail.values()) > 1:
            raise ValueError("the rates of all failures add up to more than 1")
        if self.image_bytes is not None and not 1 <= self.image_bytes <= _MOST_BYTES:
            raise ValueError(f"image_bytes goes from 1 to 1 GiB, not {self.image_bytes}")
        if self.room is not None and self.room < 1:
            raise ValueError(f"there is room for at least 1 call, not {self.room}")
        if self.items not in ITEMS:
            raise ValueError(f"items is one of {', '.join(ITEMS)}, not {self.items!r}")


def latency_range(latency: float | str | tuple[float, float]) -> tuple[float, float]:
    """Return the shortest and the longest latency in seconds.

    >>> latency_range(2), latency_range("0.5-1.5"), latency_range((1, 2))
    ((2.0, 2.0), (0.5, 1.5), (1.0, 2.0))

    Raises:
        ValueError: it is neither seconds nor a range of them.
    """
    try:
        if isinstance(latency, str):
            low, _, high = latency.partition("-")
            return float(low), float(high or low)
        shortest, longest = latency if isinstance(latency, tuple) else (latency, latency)
        return float(shortest), float(longest)
    except (TypeError, ValueError):
        raise ValueError(f"latency is seconds, e.g. 2 or 0.5-1.5, not {latency!r}") from None


class Told(BaseModel):
    """What a prompt tells the sandbox to do: its directives, as this module's docstring explains them."""

    status: Annotated[str, AfterValidator(checked_name)] | None = None
    times: int = Field(default=sys.maxsize, ge=0)
    latency: float | None = Field(default=None, ge=0, le=600)
    images: int = Field(default=sys.maxsize, ge=0)
    wrapped: bool = False


def fate_of(told: Told, request_hash: str, call: int, behaviour: Behaviour) -> tuple[float, str | None]:
    """Return how many seconds the images of a call take, and the name of the failure that it ends with, if it does.

    The prompt may tell both, else chance does, which is the same for the same seed, request and number of the call, in
    whatever order requests arrive.

    Args:
        told: by the prompt.
        request_hash: of the request.
        call: how often it has arrived, this time included.
        behaviour: the sandbox's.

    >>> behaviour = Behaviour(fail={"429": 0.5})
    >>> fate_of(Told(), "f5a1", 1, behaviour), fate_of(Told(latency=2), "f5a1", 2, behaviour)
    ((0.0, '429'), (2.0, None))
    """
    chance = random.Random(f"{behaviour.seed}/{request_hash}/{call}")  # noqa: S311 - no secret
    latency = chance.uniform(*latency_range(behaviour.latency))
    rates = list(behaviour.fail.values())
    (failure,) = chance.choices([*map(str, behaviour.fail), None], [*rates, 1 - sum(rates)])
    if told.status and call <= told.times:
        failure = told.status
    return latency if told.latency is None else told.latency, failure


_DIRECTIVE: Final = re.compile(r"\[\[sandbox:([^\]=]*)=?([^\]]*)\]\]")
_WORDS: Final = [name for name in (*FAILURES, *LOST) if not name.isdigit()]


def told_by(prompt: str) -> Told:
    """Return what `prompt` tells the sandbox to do.

    >>> told_by("a cat [[sandbox:status=503]] [[sandbox:times=1]]").model_dump(exclude_unset=True)
    {'status': '503', 'times': 1}

    Raises:
        Refused: it asks for what the sandbox does not know.
    """
    found = {}
    for name, value in _DIRECTIVE.findall(prompt):
        if name in _WORDS and not value:
            found["status"] = name
        elif name in Told.model_fields:
            found[name] = value or "true"
        else:
            known = ", ".join([*Told.model_fields, *_WORDS])
            told = f"the sandbox knows no [[sandbox:{name[:40]}]]; it knows {known}"
            raise Refused.for_request(told, "prompt")
    try:
        return Told.model_validate(found)
    except ValidationError as error:
        wrong = error.errors()[0]
        told = f"[[sandbox:{wrong['loc'][0]}={wrong['input'][:40]}]]: {wrong['msg']}"
        raise Refused.for_request(told, "prompt") from None
