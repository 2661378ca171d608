"""An S3 service as one account sees it: calls by name, tried again with patience, with credentials that can expire."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, ClientError

from prefect_ttapi.storage.accounts import Account
from prefect_ttapi.storage.objects import PATIENCE, NoAnswerError
from prefect_ttapi.storage.s3_errors import explain, may_be_expired
from prefect_ttapi.version import VERSION

Answer = TypeVar("Answer")

#: Enough for 100 requests in flight, their renewals and look-ups.
_CONNECTIONS: Final = 128

#: Seconds. Short of a claim's life, so that a renewal can be tried more than once.
_CONNECT_TIMEOUT: Final = 10
_READ_TIMEOUT: Final = 20

#: Seconds between attempts: doubled each time, up to the second figure.
_PAUSES: Final = (0.2, 5.0)

#: Clients of this process, by account; the one that was made first goes first.
_clients: dict[tuple[Account, int], s3fs.S3FileSystem] = {}
_MOST_CLIENTS: Final = 32
_making = threading.Lock()


class Service:
    """The service of an account; all stores of an account share one client with its pool of connections."""

    def __init__(self, account: Account) -> None:
        self.account = account

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """What `work` gives, run where the client lives; for any thread but that one."""
        try:
            loop = _client(self.account).loop
        except BaseException:
            work.close()  # without credentials there is no client: Python would warn that nobody awaits it
            raise
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request, as botocore names methods and arguments."""
        answer: dict[str, Any] = await _client(self.account)._call_s3(method, **arguments)
        return answer

    async def sign(self, method: str, parameters: dict[str, Any], seconds: int) -> str:
        """An address that lets anybody make this call for `seconds`."""
        client = await _client(self.account).set_session()
        url: str = await client.generate_presigned_url(method, Params=parameters, ExpiresIn=seconds)
        return url

    async def patiently(
        self, doing: str, attempt: Callable[[], Awaitable[Answer]], patience: float = PATIENCE
    ) -> Answer:
        """What `attempt` gives, tried again for `patience` seconds while no answer settles it.

        Where the credentials may have expired they are asked for anew, once.
        """
        started, (pause, longest_pause) = time.monotonic(), _PAUSES
        renewed = not self.account.renewable
        while True:
            used = _client(self.account)
            try:
                return await attempt()
            except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
                if may_be_expired(error) and not renewed:
                    renewed = True
                    # in a thread: whoever gives the credentials may take a while
                    await asyncio.to_thread(_renew, self.account, used)
                    continue
                explained = explain(error, doing)
                if not isinstance(explained, NoAnswerError) or time.monotonic() + pause > started + patience:
                    raise explained from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest_pause)


def _client(account: Account) -> s3fs.S3FileSystem:
    # a client does not survive a fork
    name = (account, os.getpid())
    if found := _clients.get(name):
        return found
    with _making:
        if name not in _clients:
            _put(name, _made(account))
        return _clients[name]


def _renew(account: Account, expired: s3fs.S3FileSystem) -> None:
    """Replace a client by one that asks for its credentials anew, unless another thread has."""
    name = (account, os.getpid())
    with _making:
        if _clients.get(name) is expired:
            _put(name, _made(account))


def _put(name: tuple[Account, int], client: s3fs.S3FileSystem) -> None:
    _clients[name] = client
    for oldest in list(_clients)[:-_MOST_CLIENTS]:
        del _clients[oldest]


def _made(account: Account) -> s3fs.S3FileSystem:
    # auto is botocore's own choice, which its configuration file may settle
    style = (
        {} if account.addressing_style == "auto" else {"s3": {"addressing_style": account.addressing_style}}
    )
    region = {"region_name": account.region} if account.region else {}
    verify = {} if account.verify is True else {"verify": account.verify}
    key, secret, token = account.keys()
    filesystem = s3fs.S3FileSystem(
        key=key,
        secret=secret,
        token=token,
        endpoint_url=account.endpoint_url,
        client_kwargs=region | verify,
        config_kwargs={
            # tries are counted here, in one place: s3fs and botocore would multiply them
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
            "connect_timeout": _CONNECT_TIMEOUT,
            "read_timeout": _READ_TIMEOUT,
            "signature_version": "s3v4",
            # trailing checksums are AWS's own; other stores refuse or ignore them
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            # botocore's own is long, and made anew for each request
            "user_agent": f"prefect-ttapi/{VERSION}",
            **style,
        },
        skip_instance_cache=True,  # fsspec's cache would share the retries set below with other users
    )
    filesystem.retries = 1
    return filesystem
