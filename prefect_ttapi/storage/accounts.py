"""Which S3 service, and who asks it: a block's own settings, then the environment's."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from prefect_ttapi.storage.aws_blocks import AwsBlock, Keys, keys_of, loaded


@dataclass(frozen=True)
class Account:
    """A service, how it is reached and who asks it; None leaves it to the AWS chain."""

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    addressing_style: str = "auto"
    verify: bool | str = True
    block: str | AwsBlock | None = field(default=None, repr=False)

    def or_block(self) -> Account:
        """This account, with what it lacks from its block of prefect-aws."""
        if self.block is None:
            return self
        block = loaded(self.block)
        parameters = block.aws_client_parameters
        verify = parameters.verify_cert_path or parameters.verify
        return replace(
            self,
            endpoint_url=self.endpoint_url or parameters.endpoint_url,
            region=self.region or block.region_name,
            verify=self.verify if self.verify is not True or verify is None else _as_botocore(verify),
        )

    def or_environment(self) -> Account:
        """This account, with what it lacks from the usual AWS variables.

        The key of the environment comes first in AWS's own chain, too. It is read here because clients are shared by
        their account, and another environment is to mean another client. AWS_REGION is unknown to botocore.
        """
        environ = os.environ.get
        own = (self.access_key_id, self.secret_access_key, self.session_token)
        found = (environ("AWS_ACCESS_KEY_ID"), environ("AWS_SECRET_ACCESS_KEY"), environ("AWS_SESSION_TOKEN"))
        key = found if all(found[:2]) and not own[0] and self.block is None else own
        return replace(
            self,
            endpoint_url=self.endpoint_url or environ("AWS_ENDPOINT_URL_S3") or environ("AWS_ENDPOINT_URL"),
            region=self.region or environ("AWS_REGION"),
            access_key_id=key[0],
            secret_access_key=key[1],
            session_token=key[2],
        )

    @property
    def renewable(self) -> bool:
        """Whether asking for credentials again may give newer ones: not where the keys are written down here."""
        return self.access_key_id is None

    def keys(self) -> Keys:
        """Its keys as of now; all None where the AWS chain finds them by itself. StoreError: a block has none."""
        if self.block is not None:
            return keys_of(self.block)
        return self.access_key_id, self.secret_access_key, self.session_token


def _as_botocore(verify: object) -> bool | str:
    return verify if isinstance(verify, bool) else str(verify)
