"""An S3 service as one account sees it: clients, tries with patience, and credentials that can expire."""

from __future__ import annotations

import io
import os
import re
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session
from urllib3.exceptions import HTTPError, InsecureRequestWarning

from prefect_ttapi.errors import StoreError
from prefect_ttapi.results import VERSION
from prefect_ttapi.stopping import backoff
from prefect_ttapi.storage.objects import PATIENCE, NoAnswerError
from prefect_ttapi.storage.s3_errors import explain, may_be_expired

Answer = TypeVar("Answer")

#: botocore makes its clients' methods from a description of the service: no type checker knows them.
Client = Any

#: Key ID, secret and session token.
Keys = tuple[str | None, str | None, str | None]

#: Enough for 100 requests in flight, their renewals and look-ups.
_CONNECTIONS: Final = 128

#: Seconds. Short of a claim's life, so that a renewal can be tried more than once.
_CONNECT_TIMEOUT: Final = 10
_READ_TIMEOUT: Final = 20

#: Seconds before the second attempt, and the longest pause.
_PAUSES: Final = (0.2, 5.0)

#: Clients of this process, by account; the one that was made first goes first.
_clients: dict[Account, Client] = {}
_MOST_CLIENTS: Final = 32
_making = threading.Lock()


@dataclass(frozen=True)
class Account:
    """A service, how it is reached and who asks it; None leaves it to the AWS chain.

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

    def keys(self) -> Keys:
        """Return its keys as of now; all None where the AWS chain finds them by itself.

        Raises:
            StoreError: there are none to be had.
        """
        if self.find_keys is not None:
            return self.find_keys()
        return self.access_key_id, self.secret_access_key, self.session_token


def patiently(
    account: Account, doing: str, attempt: Callable[[Client], Answer], patience: float = PATIENCE
) -> Answer:
    """Return what `attempt` gives, tried again for `patience` seconds while no answer settles it.

    Credentials that may have expired are asked for anew, once, unless they are written down in the account.

    Args:
        doing: what is done to which object, for an error's message.

    Raises:
        StoreError: the service refused, or there are no credentials.
        NoAnswerError: no answer settled it in time.
    """
    deadline, pauses = time.monotonic() + patience, backoff(*_PAUSES)
    renewable = account.access_key_id is None
    while True:
        client = None
        try:
            client = _client(account)
            return attempt(client)
        except (OSError, BotoCoreError, ClientError, HTTPError) as error:
            if renewable and may_be_expired(error):
                renewable = False
                _forget(account, client)
                continue
            explained, pause = explain(error, doing), next(pauses)
            if not isinstance(explained, NoAnswerError) or time.monotonic() + pause > deadline:
                raise explained from error
        time.sleep(pause)


def _client(account: Account) -> Client:
    if found := _clients.get(account):
        return found
    with _making:
        if account not in _clients:
            _clients[account] = _made(account)
            for oldest in list(_clients)[:-_MOST_CLIENTS]:
                del _clients[oldest]
        return _clients[account]


def _forget(account: Account, expired: Client) -> None:
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
    key, secret, token = account.keys()
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
    return client


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Don't ask first whether a body is wanted that is in memory: it would cost more than it could spare."""
    if isinstance(params.get("body"), io.BytesIO):
        params["headers"].pop("Expect", None)


def _check_authorities(file: str) -> None:
    """Raise a StoreError if the file holds no certificates: botocore would tell of it as of a lost connection."""
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:  # also where it is no PEM
        why = f"can't use the certificates in {file}: {error.strerror or error}"
        raise StoreError(f"{why}: correct connection.ca_file") from error
