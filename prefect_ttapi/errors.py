"""Every error this package raises.

TTAPIError                    the API, or the way to it; has status_code, request_id, message, outcome
├── InvalidRequestError       400, 404, 413, 422: the same request would fail again
│   └── ModerationError       the prompt was refused, whatever the status
├── AuthenticationError       401, 403: every other call would fail too
├── InsufficientBalanceError  402, and whatever says the same: every other call would fail too
├── ModelNotPermittedError    this account may not use this model
├── RateLimitError            429
├── QueueFullError            499: the account's queue for this product is full
├── ServerError               500, 502, 503
├── APIConnectionError        the request never reached the server
├── UnknownOutcomeError       408, 504, 520, 522, 524, read timeout, connection lost after sending: perhaps paid
├── InvalidResponseError      a 200 that is no usable answer: perhaps paid
└── DownloadError             paid, but an image URL could not be fetched
StoreError                    the image store: unreachable, unwritable, refused
├── NotStoredError            paid for, but the store did not take the images: kept in the rescue folder
├── KeyTakenError             something else is at the key that an image is to be delivered to
└── ImageMissingError         an object that a record names is gone or has another size
PictureError                  an image that can't be decoded, so that nothing can be made of it; a ValueError
SigningError                  a copy that could not be given Content Credentials; it was not delivered
BudgetExceeded                the batch's budget does not allow another request
BatchError                    a batch ended with failed rows
IllegalBatchError             a batch that can't be sent as it is; a ValueError
KeyTemplateError              a key template that no object can have, or not each of these; a ValueError
PromptsError                  a prompts file that can't be used; a ValueError
LaneLostError                 a task run of a batch broke down; in rows only
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from prefect_ttapi.lineage.report import BatchReport
    from prefect_ttapi.results import RawAnswer


#: What the package exports.
__all__ = [
    "APIConnectionError",
    "AuthenticationError",
    "BatchError",
    "BudgetExceeded",
    "DownloadError",
    "IllegalBatchError",
    "ImageMissingError",
    "InsufficientBalanceError",
    "InvalidRequestError",
    "InvalidResponseError",
    "KeyTakenError",
    "KeyTemplateError",
    "ModelNotPermittedError",
    "ModerationError",
    "PictureError",
    "PromptsError",
    "QueueFullError",
    "RateLimitError",
    "ServerError",
    "SigningError",
    "StoreError",
    "TTAPIError",
    "UnknownOutcomeError",
]


class Outcome(StrEnum):
    """What became of a request that did not give its images.

    The values are stored in ledger and manifest; they decide whether a request may be sent again.
    """

    NEVER_DELIVERED = "never delivered"  # no byte of it reached the server: not paid
    REJECTED = "rejected before work"  # 429, 499: not paid, welcome later
    SERVER_FAULT = "server fault"  # 500, 502, 503: unlikely to be paid
    UNKNOWN = "unknown"  # may have been worked on, and paid
    UNUSABLE = "answered but unusable"  # perhaps paid
    REFUSED = "refused for good"  # not paid; the same request would be refused again


class TTAPIError(Exception):
    """The API, or the way to it, did not give the images.

    Attributes:
        message: the vendor's own words where there are any, else ours.
        status_code: the HTTP status, or None where no answer came.
        request_id: the API's id of the call, where it sent one.
        outcome: what became of the request, hence whether it may have been paid for.
        attempts: how often the request was sent or tried to be sent.
        elapsed: seconds from the first attempt to this error.
        retry_after: seconds the API asked to wait, where it did.
        not_resent: why it was not sent again, where it might have been.
        answer: what came, where it may be paid and gave no images: `TTAPIClient.read_again` reads it. It stays in its
            process: a pickled error has none.
        taken_for: what the answer was taken for, and why, where that is not certain.
        kept_at: where the answer is kept that could not be read, in words, and what becomes of it.
    """

    outcome: Outcome = Outcome.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        request_id: str | None = None,
        outcome: Outcome | None = None,
        attempts: int = 1,
        elapsed: float = 0.0,
        retry_after: float | None = None,
        not_resent: str | None = None,
        answer: RawAnswer | None = None,
        taken_for: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status_code = status_code
        self.request_id = request_id
        self.outcome = outcome or type(self).outcome
        self.attempts = attempts
        self.elapsed = elapsed
        self.retry_after = retry_after
        self.not_resent = not_resent
        self.answer = answer
        self.taken_for = taken_for
        self.kept_at: str | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message,), {**vars(self), "answer": None}

    def __str__(self) -> str:
        status = f"HTTP {self.status_code}" if self.status_code else ""
        tries = f"{self.attempts} attempts in {self.elapsed:.1f} s" if self.attempts > 1 else ""
        request_id = f"request id {self.request_id}" if self.request_id else ""
        not_resent = f"not sent again: {self.not_resent}" if self.not_resent else ""
        taken_for = f"taken for {self.taken_for}" if self.taken_for else ""
        facts = (status, taken_for, tries, f"outcome: {self.outcome}", not_resent, request_id)
        kept = f"; {self.kept_at}" if self.kept_at else ""
        return f"{self.message} ({', '.join(fact for fact in facts if fact)}){kept}"


class InvalidRequestError(TTAPIError):
    """400, 404, 413, 422: the same request would be refused again. Not paid."""

    outcome = Outcome.REFUSED


class ModerationError(InvalidRequestError):
    """The prompt, or what was drawn from it, was refused for its content. Not paid; another prompt may pass."""


class AuthenticationError(TTAPIError):
    """401, 403, or words for it: wrong key, blocked account, country; every other call would fail too. Not paid."""

    outcome = Outcome.REFUSED


class InsufficientBalanceError(TTAPIError):
    """402, or words for it: the prepaid balance is used up; every other call would fail too. Not paid."""

    outcome = Outcome.REFUSED


class ModelNotPermittedError(TTAPIError):
    """This account may not use this model; every other call for it would fail too. Not paid."""

    outcome = Outcome.REFUSED


class RateLimitError(TTAPIError):
    """429: too many requests. Not paid."""

    outcome = Outcome.REJECTED


class QueueFullError(TTAPIError):
    """499: the account's queue for this product is full. Not paid."""

    outcome = Outcome.REJECTED


class ServerError(TTAPIError):
    """500, 502, 503: the server failed. Unlikely to be paid."""

    outcome = Outcome.SERVER_FAULT


class APIConnectionError(TTAPIError):
    """The request never reached the server: refused connection, DNS, TLS, connect timeout, 425, 521. Not paid."""

    outcome = Outcome.NEVER_DELIVERED


class UnknownOutcomeError(TTAPIError):
    """408, 504, 520, 522, 524, read timeout, connection lost after sending: it may have been worked on, and paid."""

    outcome = Outcome.UNKNOWN


class InvalidResponseError(TTAPIError):
    """A 200 that nobody can read, a stream that ends early, bytes that are no image. Perhaps paid; see `answer`."""

    outcome = Outcome.UNUSABLE


class DownloadError(TTAPIError):
    """The API answered and was paid, but the image behind its URL could not be fetched; `answer` has the URL.

    The message never contains the URL: its query may be signed. `status_code` is the image host's.
    """

    outcome = Outcome.UNUSABLE


#: Every later call with the same account would fail in the same way: a batch stops.
ACCOUNT_ERRORS = (AuthenticationError, InsufficientBalanceError)


class StoreError(Exception):
    """The image store can't be reached, read or written; the message says which and what to do."""


class ImageMissingError(StoreError):
    """An object that a record names is gone, or has another size than recorded."""


class KeyTakenError(StoreError):
    """Something else is at the key that an image is to be delivered to, and may not be replaced.

    A batch knows that before it pays, unless somebody writes there meanwhile: nothing was sent, or the row has images.
    """


class NotStoredError(StoreError):
    """The API answered, and was paid, but the store did not take the images.

    The message says where they are kept: the next run takes them from there, and pays nothing.
    """


class PictureError(ValueError):
    """An image that can't be decoded, or not safely, so that no thumbnail or rendition can be made of it."""


class SigningError(Exception):
    """A copy could not be given Content Credentials, and was not delivered; the message says why."""


class BudgetExceeded(Exception):  # noqa: N818 - the public name
    """The batch's budget does not allow another request; nothing was sent for this one."""


class BatchError(Exception):
    """A batch ended with failed rows; the message counts them by kind and gives examples.

    The report is in `report`: everything that did not fail is generated, delivered and recorded.
    """

    def __init__(self, message: str, report: BatchReport | None = None) -> None:
        super().__init__(message)
        # pickle makes an error of its message, and gives it the rest afterwards
        self.report = cast("BatchReport", report)


class LaneLostError(Exception):
    """A task run of a batch broke down, so that nobody knows what became of its requests; named in their rows."""


class IllegalBatchError(ValueError):
    """A batch that can't be sent as it is: illegal requests, or two images for one key. Nothing was sent.

    The message has a line for each problem; `problems` has them all.
    """

    SHOWN = 20

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        more = [f"and {len(problems) - self.SHOWN} more"] if len(problems) > self.SHOWN else []
        summary = f"nothing was sent: {len(problems)} problem(s) in the batch"
        super().__init__("\n  ".join([summary, *problems[: self.SHOWN], *more]))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,)


class KeyTemplateError(ValueError):
    """A key template is illegal, or a value does not fit it; the message says what to do in one line."""


class PromptsError(ValueError):
    """A prompts file can't be used: a line that says so, then one for each problem, with its lines."""


def printable(text: str) -> str:
    r"""Return a text on one line without control characters: parts of it may be somebody else's words.

    >>> printable("no\n such \x1b[31mkey")
    'no such [31mkey'
    """
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
