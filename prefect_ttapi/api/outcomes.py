"""What became of a request, and whose fault it is: one table of signs (sans-IO).

A request of which the last byte was not handed to the network can't have been worked on: its JSON is
incomplete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """What the API says went wrong: one line of printable text, and OpenAI's labels where they came.

    Attributes:
        inner: Azure's code within the error.
        page: it is no API that says it, but a page for people.
    """

    message: str
    type: str | None = None
    code: str | None = None
    inner: str | None = None
    page: bool = False


@dataclass(frozen=True)
class Verdict:
    """What an attempt that failed means; its outcome is its error's.

    Attributes:
        name: whose fault it is, as in "taken for ...".
        taken_for: the fault, and why it is taken for that, where that is not certain.
    """

    name: str
    error: type[errors.TTAPIError]
    again: Again
    taken_for: str | None = None


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


ACCOUNT: Final = Verdict("a fault of the account", errors.AuthenticationError, Again.NEVER)
PACE: Final = Verdict("too many requests", errors.RateLimitError, Again.FREELY)
CREDIT: Final = Verdict("a lack of credit", errors.InsufficientBalanceError, Again.NEVER)
MODEL: Final = Verdict("a model that this account may not use", errors.ModelNotPermittedError, Again.NEVER)
PROMPT: Final = Verdict("a refused prompt", errors.ModerationError, Again.NEVER)
FIREWALL: Final = Verdict("a firewall's page", errors.InvalidRequestError, Again.NEVER)
REQUEST: Final = Verdict("a refusal of this request", errors.InvalidRequestError, Again.NEVER)
QUEUE: Final = Verdict("a full queue", errors.QueueFullError, Again.FREELY)
SERVER: Final = Verdict("a fault of the server", errors.ServerError, Again.TWICE)
UNREACHED: Final = Verdict("a server that was not reached", errors.APIConnectionError, Again.FREELY)
UNKNOWN: Final = Verdict("an unknown outcome", errors.UnknownOutcomeError, Again.OPTED_IN)
OTHER: Final = replace(UNKNOWN, again=Again.NEVER)
UNUSABLE: Final = Verdict("an answer of no use", errors.InvalidResponseError, Again.NEVER)

BREAKS: Final[Mapping[Break, Verdict]] = {
    **dict.fromkeys((Break.CONNECTING, Break.SENDING), UNREACHED),
    **dict.fromkeys((Break.SILENT, Break.LOST, Break.CUT), UNKNOWN),
}


@dataclass(frozen=True)
class Sign:
    """What a verdict is known by, and who says so.

    Attributes:
        statuses: of HTTP, where neither codes nor words say more.
        codes: an error's `code` or `type`, in lower case, with blanks between them.
        words: a pattern for the API's own words, in lower case, with single blanks.
        below: codes and words count under statuses below this.
        page: the statuses are those of an HTML page.
    """

    verdict: Verdict
    source: str
    statuses: tuple[int, ...] = ()
    codes: str = ""
    words: str = ""
    below: int = 600
    page: bool = False


_OPENAI: Final = "OpenAI, error codes guide"
_AZURE: Final = "Azure OpenAI, content filtering guide and reports"
_RELAYS: Final = "one-api and new-api, source"
_OPENROUTER: Final = "OpenRouter, errors page"
_VENDOR: Final = "TTAPI, response and billing pages"
_CLOUDFLARE: Final = "Cloudflare, 4xx and 5xx errors"

#: Codes are looked for first, then words, then the status, and in each the rows above go first. No word stands alone,
#: so that a prompt of one word has none of them.
SIGNS: Final = (
    Sign(
        ACCOUNT,
        _OPENAI,
        (401, 403),
        "invalid_api_key account_deactivated invalid_organization unsupported_country_region_territory",
        r"(?:incorrect|invalid) (?:tt-)?api[ -]?key|(?:country|region|location)\S* (?:or territory |is )?not supported"
        r"|unsupported (?:country|region)|not available in your (?:country|region)"
        r"|access (?:was|has been) terminated|must be a member of an organization|ip (?:is )?not authorized",
    ),
    Sign(
        ACCOUNT,
        _AZURE,
        words=r"\b(?:account(?: \S+){0,2}?|resource|organi[sz]ation|subscription|user|key|token) (?:is|was|has been)"
        r"(?: temporarily| permanently)? (?:blocked|suspended|deactivated|disabled|banned|terminated|locked)\b",
    ),
    Sign(
        ACCOUNT,
        _RELAYS,
        words=r"api[ -]?key (?:is )?(?:invalid|expired|not valid)|invalid token\b|无效的令牌|令牌已过期|令牌状态不可用"
        r"|用户已被封禁|账号已被封",
    ),
    Sign(
        PACE,
        "OpenAI, rate limits guide; Azure OpenAI, quotas and limits",
        (429,),
        "rate_limit_exceeded rate_limit_error too_many_requests slow_down",
        r"(?:requests|tokens|images|calls) per (?:second|min|minute|hour|day)\b|rate limit|too many requests"
        r"|(?:retry|try again) (?:in|after) [0-9.]+ ?(?:m?s|sec|seconds?|min|minutes?)\b",
    ),
    Sign(
        CREDIT,
        _OPENAI,
        codes="insufficient_quota billing_hard_limit_reached billing_not_active credit_balance_exhausted "
        "organization_spend_limit_exceeded organization_usage_limit_exceeded project_spend_limit_exceeded",
        words=r"exceeded your current quota|check your (?:plan and )?billing|billing hard limit"
        r"|billing (?:is )?not active",
    ),
    Sign(
        CREDIT,
        _RELAYS,
        codes="insufficient_user_quota pre_consume_token_quota_failed token_quota_exhausted insufficient_balance "
        "balance_not_enough",
        words=r"pre-?consumed? (?:token )?quota failed|额度不足|额度已用尽|预扣费额度失败|余额不足|账户欠费"
        r"|\b(?:monthly|total|account) quota (?:is |was |has been )?(?:exceeded|reached)",
    ),
    Sign(
        CREDIT,
        _OPENROUTER,
        codes="payment_required insufficient_credits",
        words=r"add more credits|requires more credits",
    ),
    Sign(
        CREDIT,
        _VENDOR,
        (402,),
        words=r"insufficient (?:account |user )?(?:balance|quota|credits?|funds)|please (?:recharge|top up)"
        r"|(?:balance|quota|credits?|credit limit) (?:is |are )?(?:insufficient|not enough|exhausted|used up|too low)"
        r"|\b(?:not|no)(?: have)? enough (?:balance|quota|credits?)|out of credit",
    ),
    Sign(
        MODEL,
        "OpenAI, error codes guide and organization verification",
        codes="model_not_permitted model_not_found",
        words=r"must be verified to use|(?:have|no) access to (?:the |this )?model\b|model (?:\S+ )?does not exist"
        r"|not (?:allowed|permitted|authori[sz]ed) to (?:use|access|sample from|generate from) (?:the |this )?model"
        r"|model (?:\S+ )?(?:is )?not (?:available|enabled|allowed|permitted) (?:for|on|to|in) (?:your|this)\b",
        below=500,  # under 503, relays say so where no channel of theirs is free
    ),
    Sign(MODEL, _RELAYS, words=r"无权使用模型|无权访问模型", below=500),
    Sign(
        PROMPT,
        "OpenAI, image generation guide",
        codes="moderation_blocked content_policy_violation safety_violations",
        words=r"safety system|content policy|usage polic(?:y|ies)|our guardrails"
        r"|violat\w+ (?:our|openai's) polic(?:y|ies)",
    ),
    Sign(
        PROMPT,
        _AZURE,
        codes="content_filter contentfilter responsibleaipolicyviolation",
        words=r"content management policy|content filter",
    ),
    Sign(
        PROMPT,
        _RELAYS,
        codes="sensitive_words_detected prompt_blocked",
        words=r"sensitive (?:words?|content)\b|敏感(?:词|信息|内容)|违规内容|内容违规|内容审核",
    ),
    Sign(
        PROMPT,
        _OPENROUTER,
        words=r"(?:input|prompt|content|request) (?:was |is |has been )?(?:flagged|moderated)\b",
    ),
    Sign(
        PROMPT,
        "reports about relays of image models; RFC 7725 for 451",
        (451,),
        "data_inspection_failed datainspectionfailed",
        r"banned (?:words?|prompt)|(?:by|our|content) moderation|(?:community|safety|content) (?:guidelines|standards)"
        r"|safety (?:filter|policy|checker)|(?:prohibited|inappropriate|nsfw) content|prompt (?:is |was )?blocked",
    ),
    Sign(FIREWALL, _CLOUDFLARE, (400, 403, 405, 406, 418), page=True),
    Sign(REQUEST, _OPENAI, (400, 404, 405, 413, 415, 422)),
    Sign(QUEUE, _VENDOR, (499,)),
    Sign(SERVER, _VENDOR, (500, 502, 503)),
    Sign(UNREACHED, _CLOUDFLARE, (521, 523, 525, 526, 530)),
    Sign(UNREACHED, "RFC 8470, early data in HTTP", (425,)),
    Sign(UNKNOWN, "TTAPI, response page; OpenRouter, errors page", (408, 504)),
    Sign(UNKNOWN, _CLOUDFLARE, (520, 522, 524)),
)
_PAGES: Final = {status: sign.verdict for sign in SIGNS if sign.page for status in sign.statuses}
_STATUSES: Final = {status: sign.verdict for sign in SIGNS if not sign.page for status in sign.statuses}
_CODES: Final = {code: sign for sign in reversed(SIGNS) for code in sign.codes.split()}
_WORDS: Final = tuple((re.compile(sign.words), sign) for sign in SIGNS if sign.words)


def judge(status: int, error: ErrorBody | None = None, prompt: str = "") -> Verdict:
    """Return whose fault an answer without images is, as `SIGNS` tells: by codes, else by words, else by its status.

    Where the status leaves open whether the request is paid, no word talks that away.

    Args:
        status: of HTTP.
        error: what the API says with it.
        prompt: the request's, which an error may repeat.

    >>> judge(499).error.__name__, judge(307).error.__name__
    ('QueueFullError', 'InvalidResponseError')
    >>> judge(418).taken_for
    'a refusal of this request: 4xx that is not in the table'
    """
    if error is None or error.page or status // 100 not in (2, 4, 5):
        return _by_status(status, page=error is not None and error.page)
    # under 200, some say their own status; 5xx would leave open what the 200 does, too
    if status < 400 and re.fullmatch("4[0-9]{2}", error.code or ""):
        status = int(error.code or 0)
    for label in (error.code, error.inner, error.type):
        sign = _CODES.get((label or "").lower())
        if sign is not None and status < sign.below:
            return sign.verdict
    by_status = _by_status(status)
    if by_status.error is errors.UnknownOutcomeError:
        return by_status
    return _by_words(status, error.message, prompt) or by_status


def _by_status(status: int, *, page: bool = False) -> Verdict:
    known = (_PAGES.get(status) if page else None) or _STATUSES.get(status)
    if known is not None:
        return known
    verdict = {4: REQUEST, 5: OTHER}.get(status // 100, UNUSABLE)
    why = "an error" if status // 100 == 2 else f"{status // 100}xx"
    return replace(verdict, taken_for=f"{verdict.name}: {why} that is not in the table")


#: Quotation marks, but no apostrophes, and what they quote.
_QUOTED: Final = re.compile(
    r"\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)|`[^`]*`|“[^”]*”|‘[^’]*’(?!\w)|«[^»]*»|「[^」]*」"
)
_MARKS: Final = "\"'`“‘«「"
#: What relays quote, since they heard it themselves.
_HEARD: Final = re.compile(r"([\"'])(?:message|msg|error)\1: ?([\"'])(.*?)\2(?=,|\})")


def _by_words(status: int, message: str, prompt: str) -> Verdict | None:
    """Return the verdict of what the API says in words of its own, where they are known."""
    said, asked = (" ".join(text.casefold().replace("\\", "").split()) for text in (message, prompt))
    own = _without(asked, said)
    # where the prompt does not stand as it is, a part of it may, without what it quotes, too
    repeated = f"{asked}\n{_unquoted(asked)}" if own == said else ""
    spelt = [(word, _CODES.get(word)) for word in re.findall(r"\w+", own) if "_" in word]
    own = _unquoted(own)
    spoken = [(found[0], sign) for words, sign in _WORDS for found in words.finditer(own)]
    for words, sign in (*spelt, *spoken):
        if sign is not None and status < sign.below and words not in repeated:
            return replace(sign.verdict, taken_for=f"{sign.verdict.name}, as it says {words!r}")
    return None


def _unquoted(said: str) -> str:
    return " ".join(_QUOTED.sub(" ", _HEARD.sub(r" \3 ", said)).split())


def _without(asked: str, said: str) -> str:
    """Return `said` without what repeats `asked`: from its first quote on, else its last words that are the same."""
    if " " not in asked:
        return said  # one word alone says nothing here, and may be one of the API's own
    quote = re.search(f"[{_MARKS}] ?{re.escape(asked)}", said)
    at = quote.start() if quote else said.rfind(asked)
    return said[:at] + said[at:].replace(asked, " ") if at >= 0 else said


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
