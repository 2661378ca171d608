"""The blocks that hold keys: to the API, with the client that a process has for it, and to sign images with."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.api.redaction import checked_key
from prefect_ttapi.capabilities import problem
from prefect_ttapi.images.signing import Algorithm, Signer
from prefect_ttapi.origins import DEFAULT_BASE_URL, checked_base_url, origin_of
from prefect_ttapi.storage.settings import SavedForm, Secret, WebAddress


class TTAPICredentials(SavedForm, CredentialsBlock):
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
        """Return the name under which answers are filed: both hosts of the vendor are one."""
        return origin_of(self.base_url)

    @classmethod
    def from_env(cls) -> Self:
        """Return credentials from `TTAPI_API_KEY` and, where set, `TTAPI_BASE_URL`.

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


def _pem_or_file(given: object) -> object:
    """Return PEM as it is; a path as text, absolute, so that a later change of directory changes nothing."""
    if isinstance(given, str) and ("-----BEGIN" in given or not given.strip()):
        return given.strip()
    return str(Path(given).expanduser().absolute()) if isinstance(given, str | Path) else given


class ContentCredentialsSigner(SavedForm, Block):
    """A certificate, and its private key, to sign Content Credentials with.

    What can be wrong with them is found at once: that they can't be read, are expired, or don't belong together.

    Example:
        Load the block that was saved in the UI or by `save`:

        ```python
        from prefect_ttapi import ContentCredentialsSigner

        signer = ContentCredentialsSigner.load("BLOCK_NAME")
        ```
    """

    model_config = ConfigDict(title="Content Credentials signer block")

    _block_type_name = "TTAPI Content Credentials Signer"
    _block_type_slug = "ttapi-content-credentials-signer"
    _renewed = frozenset({"certificates"})
    _description = "This block holds a certificate and its private key, which sign delivered images."

    certificates: Annotated[str, BeforeValidator(_pem_or_file)] = Field(
        repr=False,
        description="These are the certificates in PEM, the signer's own first, then the one that it was issued with, "
        "and so on. The path of a file that holds them will do, too.",
    )
    private_key: Secret = None
    """This is the key of the first certificate, in PEM, without a passphrase."""
    private_key_file: Annotated[str | None, BeforeValidator(_pem_or_file)] = None
    """Instead of the key, this can be the path of a file that holds it, on each machine that delivers images."""
    algorithm: Algorithm | None = None
    """Without an algorithm, the one that goes with the key is used, and ps256 with an RSA key."""
    time_stamp_url: WebAddress = Field(
        default=None,
        title="Time-stamp URL",
        description="A time-stamp authority at this address (RFC 3161) confirms when each image was signed. Without "
        "it, signatures are no longer valid when the certificate expires.",
    )

    if TYPE_CHECKING:  # type checkers take a field's type for what may be given

        def __init__(
            self,
            *,
            certificates: str | Path,
            private_key: SecretStr | str | None = ...,
            private_key_file: str | Path | None = ...,
            algorithm: Algorithm | None = ...,
            time_stamp_url: str | None = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _can_sign(self) -> Self:
        try:
            self.get_signer()
        except ValueError as error:
            # with all that was given, pydantic's own error would have the key
            told = InitErrorDetails(type=problem("signer", str(error)), loc=(), input=None)
            raise ValidationError.from_exception_data(type(self).__name__, [told]) from None
        return self

    @classmethod
    def for_testing(cls, name: str = "prefect-ttapi") -> Self:
        """Return a signer with a certificate made now, for a year, which viewers show as not trusted.

        Args:
            name: the name that the certificate is issued to.
        """
        from prefect_ttapi.sandbox.pictures import certificates_for_testing

        certificates, key = certificates_for_testing(name)
        return cls(certificates=certificates.decode(), private_key=SecretStr(key.decode()))

    def get_signer(self) -> Signer:
        """Return a signer, made from the certificates and the key as they are now.

        Raises:
            ValueError: they can't sign, and why; or the extra `provenance` is not installed.
        """
        if bool(self.private_key) == bool(self.private_key_file):
            raise ValueError("give either private_key or private_key_file")
        if "PRIVATE KEY-----" in self.certificates:
            raise ValueError("certificates hold a private key: give it as private_key, which is kept secret")
        if "-----BEGIN" in (self.private_key_file or ""):
            raise ValueError(
                "private_key_file holds the key itself: give it as private_key, which is kept secret"
            )
        try:
            key = (
                self.private_key.get_secret_value().encode()
                if self.private_key
                else Path(self.private_key_file or "").read_bytes()
            )
            is_pem = "-----BEGIN" in self.certificates
            certificates = self.certificates.encode() if is_pem else Path(self.certificates).read_bytes()
            return Signer.of(certificates, key, self.algorithm, self.time_stamp_url)
        except OSError as error:
            # whoever gives the key in place of the file's name is not to read it in a log
            name = (
                self.certificates if error.filename == self.certificates else "the file of private_key_file"
            )
            raise ValueError(f"{name} can't be read: {error.strerror}") from None


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
