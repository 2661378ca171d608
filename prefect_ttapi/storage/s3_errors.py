"""One line for each refusal or silence of an S3 service: its meaning, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.objects import ConflictError, NoAnswerError, NoConditionsError

#: Statuses after which it is not known what happened, or that ask to try again: all 5xx but those that stay.
_UNSETTLED: Final = frozenset({408, 409, 425, 429, *range(500, 600)} - {501, 505, 507, 511})
#: What did not arrive as it was sent, or was too much at once, whatever the status: the next attempt may do.
_UNSETTLED_CODES: Final = frozenset(
    {
        *("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout"),
        *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"),
    }
)
#: How services answer to a condition that they don't know; 304 is for reads.
_MINDS_CONDITIONS: Final = frozenset({"304", "InvalidArgument", "InvalidRequest", "NotImplemented", "501"})

_NO_PERMISSION = (
    "the credentials don't allow it: they need s3:GetObject, s3:PutObject and s3:ListBucket, without which what is "
    "missing is forbidden; buckets whose requesters pay can't be used"
)
_OTHER_REGION = "the bucket is in {region}: set the store's region"
_EXPIRED = "the credentials have expired: renew them"
_FULL = "the store is full: make room"
_UNKNOWN_KEY = "the access key ID is unknown there: correct access_key_id, or AWS_ACCESS_KEY_ID"
_BUSY = "the service is too busy"
_DAMAGED_ON_THE_WAY = "it was altered or cut short on the way"
#: What to do, by the store's error code, or what comes before its dot; by status where an answer has no body.
_ADVICE: Final[Mapping[str, str]] = {
    "NoSuchBucket": "the bucket does not exist: create it, or correct the store's url",
    "InvalidBucketName": "this is no legal bucket name: correct the store's url",
    "AccessDenied": _NO_PERMISSION,
    "AllAccessDisabled": _NO_PERMISSION,
    "403": _NO_PERMISSION,
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": "the secret access key is wrong: correct it, or AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "RequestTimeTooSkewed": "this machine's clock is {clock}: set it",
    "PermanentRedirect": _OTHER_REGION,
    "TemporaryRedirect": _OTHER_REGION,
    "AuthorizationHeaderMalformed": _OTHER_REGION,
    "IllegalLocationConstraintException": _OTHER_REGION,
    "InvalidRegion": _OTHER_REGION,
    "301": _OTHER_REGION,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "AccessControlListNotSupported": "the bucket takes no access control lists: leave out upload.acl",
    "InvalidStorageClass": "there is no such storage class: correct upload.storage_class",
    "InvalidTag": "the tags are not taken: correct upload.tags",
    "NotImplemented": "this service can't do it: leave out what its documentation doesn't list ({words})",
    "InvalidRequest": "the service doesn't take it, perhaps for one of the upload options ({words})",
    "KMS": "the KMS key can't be used: correct upload.kms_key_id ({words})",
    "BadDigest": _DAMAGED_ON_THE_WAY,
    "XAmzContentSHA256Mismatch": _DAMAGED_ON_THE_WAY,
    "IncompleteBody": _DAMAGED_ON_THE_WAY,
    **dict.fromkeys(("SlowDown", "Throttling", "ThrottlingException", "429", "503"), _BUSY),
}
_NOTHING_ANSWERS = "nothing answers there: check the endpoint's address and that it is up"
_ADVICE_WITHOUT_ANSWER: Final[Mapping[str, str]] = {
    "EndpointConnectionError": _NOTHING_ANSWERS,
    "ConnectTimeoutError": _NOTHING_ANSWERS,
    "NoTLSError": "the endpoint speaks no TLS: does its address begin with http:// ?",
    "CertificateError": "its certificate can't be verified: check the endpoint's address, or name its authority "
    "in connection.ca_file",
    "NoCredentialsError": "there are no credentials: give access_key_id and secret_access_key, or AWS's own",
    "PartialCredentialsError": "the credentials are incomplete: give access_key_id and secret_access_key",
    "ProfileNotFound": "there is no such profile: correct AWS_PROFILE",
}

#: What OpenSSL says of a handshake that failed.
_HANDSHAKE: Final[Mapping[str, str]] = {
    "CERTIFICATE_VERIFY_FAILED": "CertificateError",
    "WRONG_VERSION_NUMBER": "NoTLSError",
    "RECORD_LAYER_FAILURE": "NoTLSError",
}

#: A missing object, with a body that says so and without; a missing bucket is another thing.
_MISSING: Final = frozenset({(404, "NoSuchKey"), (404, "404")})

#: What a service says of credentials that were good before.
_OLD_CREDENTIALS: Final = frozenset({"ExpiredToken", "InvalidToken", "InvalidAccessKeyId"})

#: botocore's errors for connections that failed on the way, rather than for something wrong here.
_LOST: Final = (HTTPClientError, IncompleteReadError, ConnectTimeoutError)

#: The region in a service's words: expecting 'eu-west-3'; expected: 20310501/garage/s3/aws4_request.
_EXPECTED: Final = re.compile(r"\bexpect(?:ing '|ed: )(?:\d{8}/)?([a-z][a-z0-9-]+)")


def is_missing(error: Exception) -> bool:
    """Return whether the service says that there is no such object."""
    return _status_and_code(error) in _MISSING


def may_be_expired(error: Exception) -> bool:
    """Return whether the service may mean that the credentials are no longer good."""
    status, code = _status_and_code(error)
    # an answer to HEAD has no body that would say more
    return code in _OLD_CREDENTIALS or (status, code) == (400, "400")


def refused_conditions(error: Exception) -> NoConditionsError | None:
    """Return what to raise where the service may have refused a write because it is conditional."""
    status, code = _status_and_code(error)
    return NoConditionsError(f"it answers {code}, HTTP {status}") if code in _MINDS_CONDITIONS else None


def explain(error: Exception, doing: str) -> StoreError:
    """Return one line that says what failed and what to do; its class says whether the write may have happened."""
    status, code = _status_and_code(error)
    if status is None:
        kind = _kind(error)
        line = f"{doing}: {_ADVICE_WITHOUT_ANSWER.get(kind) or f'the answer was lost ({kind})'}"
        settled = isinstance(error, BotoCoreError) and not isinstance(error, _LOST) and kind != "SSLError"
        return StoreError(line) if settled else NoAnswerError(line)
    if status == 412 or (status, code) in _MISSING:
        return ConflictError(f"{doing}: it is not as expected (HTTP {status})")
    known = (_ADVICE.get(name) for name in (code, code.partition(".")[0], str(status)))
    advice = next(filter(None, known), "{words}").format_map(_details(error))
    kind_of_error = NoAnswerError if status in _UNSETTLED or code in _UNSETTLED_CODES else StoreError
    return kind_of_error(_printable(f"{doing}: {advice} ({code}, HTTP {status})"))


def _printable(line: str) -> str:
    """Return it on one line without control characters: parts of it are the service's own words."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in line).split())


def _details(error: Exception) -> dict[str, str]:
    """Return region, clock and words of an answer, for an advice to quote."""
    answer = _answer(error)
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or answer.get("Error", {}).get("Region")
    region = region or ((expected := _EXPECTED.search(str(error))) and expected[1])
    return {
        "region": f"the region {region}" if region else "another region",
        "clock": _clock(headers.get("date", "")),
        "words": str(error)[:200],
    }


def _clock(theirs: str) -> str:
    """Return how this machine's clock stands by the time that the service gives."""
    try:
        ahead = (datetime.now(UTC) - parsedate_to_datetime(theirs)).total_seconds() / 60
    except (ValueError, TypeError):
        return "wrong"
    # services forgive a few minutes: what differs by less went wrong elsewhere on the way
    return f"{abs(ahead):,.0f} minutes {'fast' if ahead > 0 else 'slow'}" if abs(ahead) > 4 else "wrong"


def _kind(error: Exception) -> str:
    """Return the error's class; of TLS, whose errors may come after a request was sent, what went wrong before."""
    found = (
        kind for words, kind in _HANDSHAKE.items() if isinstance(error, SSLError) and words in str(error)
    )
    return next(found, type(error).__name__)


def _status_and_code(error: Exception) -> tuple[int | None, str]:
    answer = _answer(error)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status, str(answer.get("Error", {}).get("Code", ""))


def _answer(error: Exception) -> Mapping[str, Any]:
    response: Mapping[str, Any] = error.response if isinstance(error, ClientError) else {}
    return response
