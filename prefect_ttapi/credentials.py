"""The block that holds the API key, and the client that a process has for it."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Annotated, Literal, Self

from prefect.blocks.abstract import CredentialsBlock
from pydantic import AfterValidator, ConfigDict, Field, SecretStr

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.redaction import checked_key
from prefect_ttapi.origins import DEFAULT_BASE_URL, checked_base_url, origin_of
from prefect_ttapi.storage.settings import NotMapped, SavedForm


class TTAPICredentials(NotMapped, SavedForm, CredentialsBlock):
    """The key to TTAPI, where to find it, and how patient to be.

    Example:
        Load the block that was saved in the UI or by `save`:

        ```python
        from prefect_ttapi import TTAPICredentials

        credentials = TTAPICredentials.load("BLOCK_NAME")
        ```

    >>> credentials = TTAPICredentials(api_key="k", base_url="https://api.ttapi.org")
    >>> credentials.api_origin
    'https://api.ttapi.io'
    """

    model_config = ConfigDict(title="Credentials block")

    _block_type_name = "TTAPI Credentials"
    _block_type_slug = "ttapi-credentials"
    _description = "This block holds the key to the TTAPI image API, and its address."

    api_key: Annotated[SecretStr, AfterValidator(checked_key)]
    """The key is in the TTAPI dashboard. It is sent as the header TT-API-KEY."""
    base_url: Annotated[str, AfterValidator(checked_base_url)] = Field(
        default=DEFAULT_BASE_URL,
        title="Base URL",
        description="For calls that take long, https://api.ttapi.org is another address of the same service. "
        "Only a service on this machine, such as the sandbox, can be reached by http.",
    )
    connect_timeout: float = Field(default=10, gt=0)
    """A connection must be made within so many seconds."""
    read_timeout: float = Field(default=600, gt=0)
    """After so many seconds of silence the outcome of a call is unknown. No model takes that long."""
    retry_unknown_outcome: bool = False
    """A call is sent again after a time-out or a lost connection. Its images may then be paid for twice."""
    on_dead_claim: Literal["retry", "unknown"] = Field(
        default="retry",
        title="After a run died while it was sending",
        description="With retry, the request is sent again, and may be paid for twice. With unknown, it fails, and the "
        "next run decides.",
    )
    max_attempts: int = Field(default=4, ge=1)
    """A call that surely was not paid for is tried so many times."""

    if TYPE_CHECKING:  # type checkers take a field's type for what may be given

        def __init__(
            self,
            *,
            api_key: SecretStr | str,
            base_url: str = ...,
            connect_timeout: float = ...,
            read_timeout: float = ...,
            retry_unknown_outcome: bool = ...,
            on_dead_claim: Literal["retry", "unknown"] = ...,
            max_attempts: int = ...,
        ) -> None: ...

    @property
    def api_origin(self) -> str:
        """The name under which answers are filed: both hosts of the vendor are one."""
        return origin_of(self.base_url)

    @classmethod
    def from_env(cls) -> Self:
        """Credentials from `TTAPI_API_KEY` and, where set, `TTAPI_BASE_URL`.

        Raises:
            ValueError: `TTAPI_API_KEY` is not set, or one of them is malformed.
        """
        key = os.environ.get("TTAPI_API_KEY", "")
        if not key:
            raise ValueError("TTAPI_API_KEY is not set: export the key from the TTAPI dashboard")
        return cls(api_key=SecretStr(key), base_url=os.environ.get("TTAPI_BASE_URL") or DEFAULT_BASE_URL)

    def get_client(self) -> TTAPIClient:
        """Return a new client, which the caller closes: `with credentials.get_client() as client: ...`."""
        return TTAPIClient(
            self.api_key,
            self.base_url,
            connect_timeout=self.connect_timeout,
            read_timeout=self.read_timeout,
            retry_unknown_outcome=self.retry_unknown_outcome,
            max_attempts=self.max_attempts,
        )


_LOCK = threading.Lock()
_CLIENTS: dict[Hashable, TTAPIClient] = {}


def shared_client(credentials: TTAPICredentials) -> TTAPIClient:
    """Return the process's client for these credentials, which is closed when the process ends.

    Task runs in threads share its connections, and its pace.
    """
    settings = tuple(getattr(credentials, name) for name in TTAPICredentials.model_fields)
    with _LOCK:
        if settings not in _CLIENTS:
            _CLIENTS[settings] = credentials.get_client()
        return _CLIENTS[settings]


@atexit.register
def _close() -> None:
    with _LOCK:
        for client in _CLIENTS.values():
            client.close()
        _CLIENTS.clear()


# connections must not be shared with a child process
os.register_at_fork(after_in_child=_CLIENTS.clear)
