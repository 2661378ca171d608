"""What can go wrong, as one table, and the three forms in which errors come.

Names of failures are the HTTP status, or a word where the status alone does not say it. They are used by
`--fail NAME:RATE`, by `Sandbox(fail={NAME: RATE})`, and in prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

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
    "413": Failure(413, "openai", "The request body is too large.", "request_too_large"),
    "422": Failure(422, "vendor", "The request cannot be processed."),
    "429": Failure(429, "openai", "Too many requests.", "rate_limit_exceeded", headers=_SLOW_DOWN),
    "499": Failure(499, "vendor", "The queue for this product is full."),
    "500": Failure(500, "openai", "The server had an error while processing your request.", "server_error"),
    "502": Failure(502, "html", "Bad Gateway"),
    "503": Failure(503, "vendor", "Service temporarily unavailable."),
    "504": Failure(504, "html", "Gateway Time-out", after_work=True),
    "520": Failure(520, "html", "Web server is returning an unknown error", after_work=True),
    "522": Failure(522, "html", "Connection timed out", after_work=True),
    "524": Failure(524, "html", "A timeout occurred", after_work=True),
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


def _vendor(failure: Failure) -> str:
    return json.dumps({"status": "FAILED", "message": failure.message, "data": None})


def _openai(failure: Failure) -> str:
    kind = "server_error" if failure.status >= 500 else "invalid_request_error"
    error = {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}
    return json.dumps({"error": error})


def _html(failure: Failure) -> str:
    title = f"{failure.status} {failure.message}"
    return f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>"


_FORMS: Final[Mapping[str, tuple[str, Callable[[Failure], str]]]] = {
    "vendor": ("application/json", _vendor),
    "openai": ("application/json", _openai),
    "html": ("text/html", _html),
}


def written(failure: Failure) -> Response:
    """Return the failure as an HTTP response."""
    media_type, form = _FORMS[failure.envelope]
    return Response(form(failure), failure.status, dict(failure.headers), media_type)
