"""What became of a request, and what that means: one table of verdicts (sans-IO).

| what happened                                        | outcome              | sent again                  |
|------------------------------------------------------|----------------------|-----------------------------|
| no connection, or the request not written in full    | never delivered      | up to `max_attempts`        |
| 429, 499                                             | rejected before work | up to `max_attempts` (*)    |
| 500, 502, 503                                        | server fault         | twice: three sends in all   |
| 504, 520-524, lost or silent after it was written    | unknown              | only where opted in         |
| any other 5xx                                        | unknown              | never                       |
| any other 4xx                                        | refused for good     | never                       |
| 1xx, 3xx; a 2xx that is no usable answer             | answered but unusable| never                       |

(*) Of a burst of requests that are rejected together, one rejection counts: see `retries`.

A request of which the last byte was not handed to the network can't have been worked on: its JSON is
incomplete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Final

from prefect_ttapi import errors
from prefect_ttapi.results import RawAnswer


class Break(StrEnum):
    """Where the way to an answer broke."""

    CONNECTING = "no connection"
    SENDING = "the connection failed while the request was being written"
    SILENT = "the server fell silent after the request was sent"
    LOST = "the connection was lost after the request was sent"
    CUT = "the answer was cut short"


class Again(StrEnum):
    """Whether a request may be sent again; the value says why not."""

    FREELY = "max_attempts is reached"
    TWICE = "500, 502 and 503 are sent three times in all"
    OPTED_IN = "it may be paid, and retry_unknown_outcome is off"
    NEVER = "it would be refused, or paid, again"


@dataclass(frozen=True)
class ErrorBody:
    """What the API says went wrong: one line of printable text, and OpenAI's labels where they came."""

    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What an attempt that failed means; its outcome is its error's."""

    error: type[errors.TTAPIError]
    again: Again


@dataclass(frozen=True)
class Failure:
    """An attempt that gave no answer.

    Attributes:
        message: fit to be shown.
        retry_after: seconds that the API asked to wait.
        answer: what came of an answer that may be paid.
    """

    verdict: Verdict
    message: str
    status_code: int | None = None
    request_id: str | None = None
    retry_after: float | None = None
    answer: RawAnswer | None = None


class BrokenOff(Exception):  # noqa: N818 - becomes a Failure
    """The answer broke off while it was read."""

    def __init__(self, broke: Break) -> None:
        super().__init__(broke)
        self.broke = broke


NEVER_DELIVERED: Final = Verdict(errors.APIConnectionError, Again.FREELY)
UNKNOWN: Final = Verdict(errors.UnknownOutcomeError, Again.OPTED_IN)
UNUSABLE: Final = Verdict(errors.InvalidResponseError, Again.NEVER)
MODERATED: Final = Verdict(errors.ModerationError, Again.NEVER)
_REFUSED: Final = Verdict(errors.InvalidRequestError, Again.NEVER)
_OTHER_FAULT: Final = Verdict(errors.UnknownOutcomeError, Again.NEVER)

BREAKS: Final[Mapping[Break, Verdict]] = {
    **dict.fromkeys((Break.CONNECTING, Break.SENDING), NEVER_DELIVERED),
    **dict.fromkeys((Break.SILENT, Break.LOST, Break.CUT), UNKNOWN),
}

STATUSES: Final[Mapping[int, Verdict]] = {
    401: Verdict(errors.AuthenticationError, Again.NEVER),
    402: Verdict(errors.InsufficientBalanceError, Again.NEVER),
    403: Verdict(errors.AuthenticationError, Again.NEVER),
    429: Verdict(errors.RateLimitError, Again.FREELY),
    499: Verdict(errors.QueueFullError, Again.FREELY),
    **dict.fromkeys((500, 502, 503), Verdict(errors.ServerError, Again.TWICE)),
    **dict.fromkeys((504, 520, 521, 522, 523, 524), UNKNOWN),
}

#: `code` or `type` of a refused prompt, in lower case: two of OpenAI's, two of Azure's, one of relays.
_MODERATION_CODES: Final = frozenset(
    {
        "moderation_blocked",
        "content_policy_violation",
        "content_filter",
        "responsibleaipolicyviolation",
        "sensitive_words_detected",
    }
)
#: Words of the same, for relays that pass on the message only. A request has a field named "moderation".
_MODERATION_WORDS: Final = re.compile(
    "|".join(_MODERATION_CODES) + "|safety system|safety_violations|content policy|content management policy"
    "|(?:by|our|content) moderation|sensitive words",
    re.IGNORECASE,
)


def judge(status: int, error: ErrorBody | None = None) -> Verdict:
    """Return what a status other than 2xx means, and what the API says with it.

    >>> judge(499).error.__name__, judge(307).error.__name__
    ('QueueFullError', 'InvalidResponseError')
    """
    if status == 400 and error is not None and is_moderation(error):
        return MODERATED
    by_class = {4: _REFUSED, 5: _OTHER_FAULT}
    return STATUSES.get(status, by_class.get(status // 100, UNUSABLE))


def is_moderation(error: ErrorBody) -> bool:
    """Tell whether the prompt, or what was drawn from it, was refused for its content.

    >>> is_moderation(ErrorBody("rejected", code="moderation_blocked"))
    True
    >>> is_moderation(ErrorBody("Unknown parameter: 'moderation'.", param="moderation"))
    False
    """
    labels = {(label or "").lower() for label in (error.code, error.type)}
    return bool(labels & _MODERATION_CODES or _MODERATION_WORDS.search(error.message))


#: A longer Retry-After is no request to wait but a mistake, and ignored like one that can't be read.
ABSURD_SECONDS: Final = 7 * 24 * 3600.0

_SECONDS: Final = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20})?|\.[0-9]{1,20}", re.ASCII)


def read_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that an answer asks to wait, or None where it doesn't, or makes no sense.

    `retry-after-ms` goes before `retry-after`, which is in seconds or a date. A date is compared with the
    answer's own `date`, where there is one, since the clocks of two machines may differ.

    Args:
        headers: the answer's, with names in lower case.
        now: Unix seconds.

    >>> read_retry_after({"retry-after": "1.5"}, now=0), read_retry_after({"retry-after": "-1"}, now=0)
    (1.5, None)
    >>> read_retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=15)
    45.0
    """
    asked = headers.get("retry-after", "")
    milliseconds, wait, date = _seconds(headers.get("retry-after-ms", "")), _seconds(asked), _timestamp(asked)
    if milliseconds is not None:
        wait = milliseconds / 1000
    elif wait is None and date is not None:
        wait = date - (_timestamp(headers.get("date", "")) or now)
    return wait if wait is not None and 0 <= wait <= ABSURD_SECONDS else None


def _seconds(text: str) -> float | None:
    number = text.strip()
    return float(number) if _SECONDS.fullmatch(number) else None


def _timestamp(text: str) -> float | None:
    try:
        date = parsedate_to_datetime(text)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):  # what hostile dates make the parser raise
        return None
