"""An S3 service: the account that asks it, clients for it, and one line for each way in which it may fail."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import ssl
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)
from botocore.session import Session
from urllib3.exceptions import InsecureRequestWarning

from prefect_ttapi.errors import StoreError, printable
from prefect_ttapi.results import VERSION
from prefect_ttapi.storage.objects import ConflictError, GoneError, NoAnswerError, NoConditionsError

#: botocore makes its clients' methods from a description of the service: no type checker knows them.
Client = Any

#: Key ID, secret and session token.
Keys = tuple[str | None, str | None, str | None]

#: Enough for 100 requests in flight, their renewals and look-ups.
_CONNECTIONS: Final = 128

#: Seconds. Short of a claim's life, so that a renewal can be tried more than once.
_CONNECT_TIMEOUT: Final = 10
_READ_TIMEOUT: Final = 20

#: Clients of this process, by account; the one that was made first goes first.
_clients: dict[Account, Client] = {}
_MOST_CLIENTS: Final = 32
_making = threading.Lock()

_AWS_CHECKSUM: Final = re.compile("x-amz-(sdk-)?checksum-", re.IGNORECASE)

#: Against accidents on the way, which is all that S3 offers it for.
MD5: Final = partial(hashlib.md5, usedforsecurity=False)


@dataclass(frozen=True)
class Account:
    """A service, the way to reach it, and the credentials for it; None leaves a field to the AWS chain.

    Attributes:
        verify: as botocore takes it: whether to verify, or against which file.
        find_keys: gives the keys as of now, where they are not written down here.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    addressing_style: str = "auto"
    verify: bool | str = True
    find_keys: Callable[[], Keys] | None = field(default=None, repr=False)

    def or_environment(self) -> Account:
        """Return this account, with what it lacks from the usual AWS variables.

        The key of the environment comes first in AWS's own chain, too. It is read here because clients are shared by
        their account, and another environment is to mean another client. AWS_REGION is unknown to botocore.
        """
        environ = os.environ.get
        own = (self.access_key_id, self.secret_access_key, self.session_token)
        found = (environ("AWS_ACCESS_KEY_ID"), environ("AWS_SECRET_ACCESS_KEY"), environ("AWS_SESSION_TOKEN"))
        key = found if all(found[:2]) and not own[0] and self.find_keys is None else own
        return replace(
            self,
            endpoint_url=self.endpoint_url or environ("AWS_ENDPOINT_URL_S3") or environ("AWS_ENDPOINT_URL"),
            region=self.region or environ("AWS_REGION"),
            access_key_id=key[0],
            secret_access_key=key[1],
            session_token=key[2],
        )


def client_for(account: Account) -> Client:
    """Return the process's client for an account."""
    if found := _clients.get(account):
        return found
    with _making:
        if account not in _clients:
            _clients[account] = _made(account)
            for oldest in list(_clients)[:-_MOST_CLIENTS]:
                del _clients[oldest]
        return _clients[account]


def forget(account: Account, expired: Client) -> None:
    """Have the next client ask for its credentials anew, unless another thread has made one already."""
    with _making:
        if _clients.get(account) is expired:
            _clients.pop(account, None)


def _start_anew() -> None:
    """Forget clients and lock in a forked process: it shares no connections, and nobody would release the lock."""
    global _making
    _making = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_start_anew)


def _made(account: Account) -> Client:
    if isinstance(account.verify, str):
        _check_authorities(account.verify)
    if account.verify is False and account.endpoint_url:
        # urllib3 says it of each connection, and it was asked for
        host = re.escape(urlsplit(account.endpoint_url).hostname or "")
        warnings.filterwarnings("ignore", f"Unverified HTTPS .* host '{host}'", InsecureRequestWarning)
    # auto is botocore's own choice, which its configuration file may settle
    style = (
        {} if account.addressing_style == "auto" else {"s3": {"addressing_style": account.addressing_style}}
    )
    own = (account.access_key_id, account.secret_access_key, account.session_token)
    key, secret, token = account.find_keys() if account.find_keys else own
    client = Session().create_client(
        "s3",
        region_name=account.region,
        endpoint_url=account.endpoint_url,
        verify=None if account.verify is True else account.verify,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        aws_session_token=token,
        config=Config(
            # tries are counted here, in one place: botocore would multiply them
            retries={"total_max_attempts": 1},
            max_pool_connections=_CONNECTIONS,
            connect_timeout=_CONNECT_TIMEOUT,
            read_timeout=_READ_TIMEOUT,
            signature_version="s3v4",
            # trailing checksums are AWS's own; other stores refuse or ignore them
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # botocore's own is long, and made anew for each request
            user_agent=f"prefect-ttapi/{VERSION}",
            **style,
        ),
    )
    client.meta.events.register_last("before-call.s3", _send_at_once)
    client.meta.events.register("before-sign.s3.PutObjectTagging", _say_md5)
    return client


def _say_md5(request: Any, **_: Any) -> None:
    """Send the MD5 of a body, which botocore takes for none, in place of checksums that AWS alone knows."""
    for name in filter(_AWS_CHECKSUM.match, list(request.headers)):
        del request.headers[name]
    request.headers["Content-MD5"] = base64_of(MD5(request.body).digest())


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Send a body that is in memory without asking first: asking would cost more than it could save."""
    if isinstance(params.get("body"), io.BytesIO):
        params["headers"].pop("Expect", None)


def _check_authorities(file: str) -> None:
    """Raise a StoreError if the file holds no certificates, which botocore would report as a lost connection."""
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:  # also where it is no PEM
        why = f"can't use the certificates in {file}: {error.strerror or error}"
        raise StoreError(f"{why}: correct connection.ca_file") from error


def base64_of(digest: bytes) -> str:
    """Return a digest as headers have it."""
    return base64.b64encode(digest).decode()


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

#: What to do, by the store's error codes, or what comes before their dot; by status where an answer has no body.
_ADVICE: Final[Mapping[str, str]] = {
    code: advice
    for codes, advice in {
        "NoSuchBucket": "the bucket does not exist: create it, or correct the store's url",
        "InvalidBucketName": "this is no legal bucket name: correct the store's url",
        "AccessDenied AllAccessDisabled 403": "the credentials don't allow it: they need s3:GetObject, s3:PutObject "
        "and s3:ListBucket, without which what is missing is forbidden; buckets whose requesters pay can't be used",
        "InvalidAccessKeyId": "the access key ID is unknown there: correct access_key_id, or AWS_ACCESS_KEY_ID",
        "SignatureDoesNotMatch": "the secret access key is wrong: correct it, or AWS_SECRET_ACCESS_KEY",
        "ExpiredToken InvalidToken": "the credentials have expired: renew them",
        "RequestTimeTooSkewed": "this machine's clock is {clock}: set it",
        "PermanentRedirect TemporaryRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException "
        "InvalidRegion 301": "the bucket is in {region}: set the store's region",
        "QuotaExceeded XMinioStorageFull": "the store is full: make room",
        "AccessControlListNotSupported": "the bucket takes no access control lists: leave out upload.acl",
        "InvalidStorageClass": "there is no such storage class: correct upload.storage_class",
        "InvalidTag": "the tags are not taken: correct upload.tags",
        "NotImplemented": "this service can't do it: leave out what its documentation doesn't list ({words})",
        "InvalidRequest": "the service doesn't take it, perhaps for one of the upload options ({words})",
        "KMS": "the KMS key can't be used: correct upload.kms_key_id ({words})",
        "BadDigest XAmzContentSHA256Mismatch IncompleteBody": "it was altered or cut short on the way",
        "SlowDown Throttling ThrottlingException 429 503": "the service is too busy",
    }.items()
    for code in codes.split()
}
#: What to do, by the class of an error that is no answer.
_ADVICE_WITHOUT_ANSWER: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("EndpointConnectionError", "ConnectTimeoutError"),
        "nothing answers there: check the endpoint's address and that it is up",
    ),
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


def may_be_expired(error: Exception) -> bool:
    """Return whether the service may mean that the credentials are no longer good."""
    status, code = _status_and_code(error)
    # an answer to HEAD has no body that would say more
    return code in _OLD_CREDENTIALS or (status, code) == (400, "400")


def explain(error: Exception, doing: str, *, answered: bool = False, conditional: bool = False) -> StoreError:
    """Return one line that says what failed and what to do; its class says whether to ask again.

    Args:
        answered: the service has answered before: that nothing does now is an outage, and no wrong address.
        conditional: it was a write with a condition, which may be why the service refused it.
    """
    status, code = _status_and_code(error)
    if status is None:
        kind = _kind(error)
        line = f"{doing}: {_ADVICE_WITHOUT_ANSWER.get(kind) or f'the answer was lost ({kind})'}"
        outage = answered and isinstance(error, EndpointConnectionError)
        lost = outage or isinstance(error, _LOST) or kind == "SSLError"
        settled = isinstance(error, BotoCoreError) and not lost
        return StoreError(line) if settled else NoAnswerError(line)
    if conditional and code in _MINDS_CONDITIONS:
        return NoConditionsError(f"it answers {code}, HTTP {status}")
    if status == 412 or (status, code) in _MISSING:
        kind_of_conflict = ConflictError if status == 412 else GoneError
        return kind_of_conflict(f"{doing}: it is not as expected (HTTP {status})")
    known = (_ADVICE.get(name) for name in (code, code.partition(".")[0], str(status)))
    advice = next(filter(None, known), "{words}").format_map(_details(error))
    kind_of_error = NoAnswerError if status in _UNSETTLED or code in _UNSETTLED_CODES else StoreError
    return kind_of_error(printable(f"{doing}: {advice} ({code}, HTTP {status})"))


def _details(error: Exception) -> dict[str, str]:
    """Return the region, clock and words of an answer, for the advice to quote."""
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
    """Return how far this machine's clock is from the time that the service gives."""
    try:
        ahead = (datetime.now(UTC) - parsedate_to_datetime(theirs)).total_seconds() / 60
    except (ValueError, TypeError):
        return "wrong"
    # services forgive a few minutes: what differs by less went wrong elsewhere on the way
    return f"{abs(ahead):,.0f} minutes {'fast' if ahead > 0 else 'slow'}" if abs(ahead) > 4 else "wrong"


def _kind(error: Exception) -> str:
    """Return the error's class; for a failed TLS handshake, before which nothing was sent, the kind of failure."""
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
