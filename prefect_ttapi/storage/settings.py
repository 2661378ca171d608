"""The common part of the blocks' forms, and the settings that need checks: addresses, options, credentials."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Coroutine, KeysView, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, Self, runtime_checkable
from unicodedata import category
from urllib.parse import quote, urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from prefect.blocks.core import Block, BlockNotSavedError
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from prefect_ttapi.capabilities import Strict, is_masked, unmasked
from prefect_ttapi.errors import StoreError, printable
from prefect_ttapi.storage.layout import normalised
from prefect_ttapi.storage.objects import Answer
from prefect_ttapi.storage.s3_service import Account, Keys, explain

logger = logging.getLogger(__name__)

#: What Prefect calls the reference to a saved block in the block's JSON.
_DOCUMENT_ID: Final = "_block_document_id"

#: The name of a saved block.
_NAMED: Final = re.compile(r"[a-z0-9-]+/[^/\s]+")

_Acl = Literal[
    "private", "public-read", "authenticated-read", "bucket-owner-read", "bucket-owner-full-control"
]

#: What a file name may hold in a header as it is (RFC 8187), and what stays in its plain ASCII twin.
_HEADER_MARKS: Final = "!#$&+-.^_`|~"
_NOT_PLAIN: Final = re.compile(r"[^ !#-\[\]-~]|%")


def _header_text(text: str | None) -> str | None:
    if text and not (text.isascii() and text.isprintable()):
        raise ValueError("holds characters that no HTTP header may have")
    return text or None


def _web_address(url: str | None) -> str | None:
    """Return an http or https address without a slash at its end; None for an empty one.

    Raises:
        ValueError: it is none, or has a user, a query or a fragment.
    """
    if not url:
        return None
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
        raise ValueError("is no address like https://example.com")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("takes no user, password, query or fragment")
    return url.strip().rstrip("/")


def _legal_tags(tags: dict[str, str]) -> dict[str, str]:
    if len(tags) > 10:
        raise ValueError(f"an object has at most 10 tags, not {len(tags)}")
    if not all(1 <= len(key) <= 128 for key in tags):
        raise ValueError("a tag's key has 1 to 128 characters")
    if any(len(value) > 256 for value in tags.values()):
        raise ValueError("a tag's value has at most 256 characters")
    if any(key.lower().startswith("aws:") for key in tags):
        raise ValueError("tags that begin with aws: are AWS's own")
    if not all(sign in " +-=._:/@" or category(sign)[0] in "LN" for sign in "".join([*tags, *tags.values()])):
        raise ValueError("a tag holds letters, digits, spaces and + - = . _ : / @ only")
    return tags


def _readable_at_once(storage_class: str | None) -> str | None:
    if storage_class in ("GLACIER", "DEEP_ARCHIVE"):
        raise ValueError(f"images in {storage_class} can't be read without restoring them: use GLACIER_IR")
    if storage_class and not re.fullmatch(r"[A-Z0-9_]{1,64}", storage_class):
        raise ValueError("is no storage class: capital letters, digits and underscores, as STANDARD_IA")
    return storage_class or None


def _as_text(path: object) -> object:
    return str(path) if isinstance(path, Path) else path


def _absolute(path: str | None) -> str | None:
    # a later change of directory changes nothing
    return str(Path(path).expanduser().absolute()) if path else None


@runtime_checkable
class AwsBlock(Protocol):
    """The common part of `AwsCredentials` and `MinIOCredentials`; prefect-aws itself is never imported here."""

    region_name: str | None
    aws_client_parameters: Any

    def __hash__(self) -> int: ...

    def get_boto3_session(self) -> Any:
        """Return the session that has the credentials."""


def _checked_block(given: object) -> str | AwsBlock | None:
    """Return the name of a saved block, or the block itself where it is not saved.

    Raises:
        ValueError: `given` is neither a block of prefect-aws nor the name of one, or not as it is saved.
    """
    if given is None or given == "":
        return None
    if isinstance(given, AwsBlock):
        name = _name_of(given)
        if name and isinstance(given, Block):
            _check_as_saved(given, _fetched(name), type(given).model_fields.keys())
        return name or given
    if isinstance(given, str) and _NAMED.fullmatch(given):
        return given
    raise ValueError(
        "is neither a block of prefect-aws nor the name of one: give aws-credentials/NAME, "
        "minio-credentials/NAME, or the block itself"
    )


HeaderText = Annotated[str | None, AfterValidator(_header_text)]
WebAddress = Annotated[str | None, AfterValidator(_web_address)]
Secret = Annotated[SecretStr | None, AfterValidator(unmasked)]
StoreUrl = Annotated[str, BeforeValidator(_as_text), AfterValidator(normalised)]
LocalPath = Annotated[str | None, BeforeValidator(_as_text)]
AwsCredentials = Annotated[Any, AfterValidator(_checked_block), WithJsonSchema({"type": "string"})]

#: Words of titles that are not written in small letters.
_SPELLED: Final = {word.lower(): word for word in ("ACL", "API", "AWS", "CA", "ID", "KMS", "TLS", "URL")}


def _titled(name: str, _: object) -> str:
    """Return a field's title in a form.

    >>> _titled("endpoint_url", None)
    'Endpoint URL'
    """
    title = " ".join(_SPELLED.get(word, word) for word in name.split("_"))
    return title[:1].upper() + title[1:]


def _plain(field: JsonSchemaValue) -> JsonSchemaValue:
    """Return a form's field without "or null", which Prefect's UIs would make a tab."""
    said = {
        name: value for name, value in field.items() if name != "anyOf" and (name, value) != ("default", None)
    }
    for kind in field.get("anyOf", ()):
        said |= {} if kind == {"type": "null"} else kind
    return said


class _Plain(Strict):
    """A form whose optional fields are plain."""

    # pydantic's echo of the input would show secrets in errors
    model_config = ConfigDict(
        hide_input_in_errors=True, use_attribute_docstrings=True, field_title_generator=_titled
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema that the form is made of, without docstrings, which are for readers of the code."""
        schema = handler(core_schema)
        form = handler.resolve_ref_schema(schema)
        form.pop("description", None)
        form["properties"] = {name: _plain(field) for name, field in form["properties"].items()}
        return schema


class UploadOptions(_Plain):
    """Headers of objects on S3. A local folder only remembers them.

    >>> print(UploadOptions(content_disposition="attachment").disposition("2031/Zoë.png"))
    attachment; filename="Zo_.png"; filename*=UTF-8''Zo%C3%AB.png
    """

    model_config = ConfigDict(title="How objects are written", frozen=True, extra="forbid")

    content_disposition: Literal["attachment", "inline"] | None = Field(
        default=None, title="Content-Disposition"
    )
    """With attachment, browsers save a delivered image under its name. With inline, they show it."""
    tags: Annotated[dict[str, str], AfterValidator(_legal_tags)] = Field(default_factory=dict)
    """Each delivered image gets these tags. There can be 10 at most."""
    acl: _Acl | None = None
    """Delivered images get this canned ACL. Most buckets no longer use access control lists."""
    prompt_in_metadata: bool = False
    """Each delivered image carries its prompt, percent-encoded. Whoever may read the image can read it, too."""
    storage_class: Annotated[str | None, AfterValidator(_readable_at_once)] = None
    """All images get this storage class, for example STANDARD_IA. Images must be readable at once."""
    encryption: Literal["AES256", "aws:kms"] | None = Field(default=None, title="Server-side encryption")
    """The service encrypts all objects, with its own keys (AES256) or with a key of AWS KMS (aws:kms)."""
    kms_key_id: HeaderText = None
    """This is the ID or the ARN of the key for aws:kms. Without it, the service uses its default key."""

    @model_validator(mode="after")
    def _has_a_key_for_kms_only(self) -> Self:
        if self.kms_key_id and self.encryption != "aws:kms":
            raise ValueError("kms_key_id goes with encryption='aws:kms'")
        return self

    def disposition(self, key: str) -> str | None:
        """Return the Content-Disposition of an image delivered to `key` (RFC 6266), if one is wanted."""
        if self.content_disposition is None:
            return None
        name = key.rpartition("/")[2]
        plain = _NOT_PLAIN.sub("_", name)
        encoded = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe=_HEADER_MARKS)}"
        return f'{self.content_disposition}; filename="{plain}"{encoded}'


class ConnectionOptions(_Plain):
    """The connection to an S3 service."""

    model_config = ConfigDict(title="How the service is reached", frozen=True, extra="forbid")

    addressing_style: Literal["auto", "path", "virtual"] = Field(
        default="auto",
        description="The bucket's name is in the path (host/bucket/key) or in the host name, which is called virtual "
        "(bucket.host/key). Auto means virtual on AWS, and path elsewhere.",
    )
    verify_tls: bool = Field(default=True, title="Verify TLS")
    """The service must prove its identity. If this is off, anybody on the way can read and alter everything."""
    ca_file: Annotated[str | None, AfterValidator(_absolute)] = None
    """This file, in PEM, has the certificates to trust if the service's own is from a private authority."""

    @model_validator(mode="after")
    def _verifies_with_its_file(self) -> Self:
        if self.ca_file and not self.verify_tls:
            raise ValueError("ca_file is of no use with verify_tls off: leave out one of them")
        return self

    @property
    def verify(self) -> bool | str:
        """Return, as botocore takes it, whether to verify, or against which file."""
        return self.ca_file or self.verify_tls


class SavedForm(_Plain):
    """The form of a block; a block that another version saved is read without the names that this one does not know.

    `.map` takes such a block as one value, with or without `unmapped`: it iterates what it can, and a pydantic model
    would be its fields. Prefect reads the fields by `dict(block)`, which needs no iteration where there are keys.
    """

    __iter__: ClassVar[Any] = None

    _added: ClassVar[frozenset[str]] = frozenset(
        {"block_type_slug", _DOCUMENT_ID, "_block_document_name", "_is_anonymous"}
    )

    #: Fields that are renewed together with a secret, so that those in older JSON are of no use.
    _renewed: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="wrap")
    @classmethod
    def _as_saved(cls, data: Any, handler: Any) -> Any:
        """Return the saved block in place of its JSON without secrets, which is what background tasks get.

        All fields are as they were saved: the JSON must not say where the key is sent. What it says must be the same,
        or the caller meant another store or service. Secrets can't be compared: here they are masked.

        Raises:
            ValueError: a field of the JSON is not as it was saved.
        """
        document = data.get(_DOCUMENT_ID) if isinstance(data, Mapping) else None
        if not document or not any(map(is_masked, data.values())):
            return handler(data)
        saved = _by_reference(cls, str(document))
        said = {name: value for name, value in data.items() if name in cls.model_fields}
        given = {name: getattr(saved, name) if is_masked(value) else value for name, value in said.items()}
        _check_as_saved(handler(given), saved, said.keys() - cls._renewed)
        return saved

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Return the block of a saved document; a name in it that is not known is a warning, and passed over."""
        return super().model_validate(_known(cls, obj), **options)

    def keys(self) -> KeysView[str]:
        """Return the names of the fields."""
        return vars(self).keys()

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]


def check_survives_json(block: SavedForm) -> None:
    """Raise ValueError if a block that is read back from Prefect's JSON would be another one.

    JSON has no secrets: a block that has any is loaded as it is saved.
    """
    if not any(isinstance(value, SecretStr | AwsBlock) for value in vars(block).values()):
        return
    kind, name = type(block).__name__, _name_of(block)
    if name is None:
        raise ValueError(
            f"nothing is sent: {kind} has secrets, which are not sent to background tasks: save the block "
            f"(block.save('NAME')), and pass it, or {kind}.load('NAME')"
        )
    saved = _by_reference(type(block), str(block.model_dump()[_DOCUMENT_ID]))
    _check_as_saved(block, saved, type(block).model_fields.keys())


def _check_as_saved(block: object, saved: object, fields: Set[str]) -> None:
    """Raise ValueError if one of these fields is not as it is saved, since the saved block would be used."""
    changed = [name for name in sorted(fields) if getattr(block, name) != getattr(saved, name, None)]
    if changed:
        name = _name_of(saved) or type(saved).__name__
        raise ValueError(
            f"nothing is sent: {name} has another {' and another '.join(changed)} than is saved under this name, and "
            "the saved one would be used: save the block first (block.save('NAME', overwrite=True)), or load it again"
        )


def _known(form: type[Strict], saved: Any) -> Any:
    """Return a saved form, or one in it, without the names that this version does not know."""
    if not isinstance(saved, Mapping):
        return saved
    for name in (name for name in saved if not form.knows(name)):
        logger.warning("%s: %s was saved by another version, and is passed over", form.__name__, name)
    kinds = {name: field.annotation for name, field in form.model_fields.items()}
    return {
        name: _known(kind, given)
        if isinstance(kind := kinds.get(name), type) and issubclass(kind, Strict)
        else given
        for name, given in saved.items()
        if form.knows(name)
    }


def with_block(account: Account, block: str | AwsBlock | None) -> Account:
    """Return the account, with what it lacks from its block of prefect-aws.

    Raises:
        StoreError: there is no such block.
    """
    if block is None:
        return account
    loaded = _loaded(block)
    parameters = loaded.aws_client_parameters
    verify = parameters.verify_cert_path or parameters.verify
    # a file is a path to prefect-aws, and its name to botocore
    verify = verify if verify is None or isinstance(verify, bool) else str(verify)
    return replace(
        account,
        endpoint_url=account.endpoint_url or parameters.endpoint_url,
        region=account.region or loaded.region_name,
        verify=verify if account.verify is True and verify is not None else account.verify,
        find_keys=_KeysOf(block),
    )


@dataclass(frozen=True)
class _KeysOf:
    """The block's credentials as of now; for an assumed role, they are new ones each time."""

    block: str | AwsBlock

    def __call__(self) -> Keys:
        try:
            found = _fetched(self.block).get_boto3_session().get_credentials()
        except (BotoCoreError, ClientError, OSError) as error:
            raise explain(error, "can't get credentials from aws_credentials") from error
        if found is None:
            raise StoreError("can't get credentials from aws_credentials: the block has none")
        frozen = found.get_frozen_credentials()
        return frozen.access_key, frozen.secret_key, frozen.token


def _by_reference(form: type[SavedForm], document_id: str) -> object:
    """Return a saved block by its document's ID.

    Raises:
        ValueError: it can't be loaded.
    """
    assert issubclass(form, Block)  # noqa: S101 - only blocks are saved
    try:
        return _awaited(form.aload_from_ref(document_id))
    except Exception as error:
        why = printable(str(error))[:200]
        raise ValueError(f"can't load the saved {form.__name__} {document_id}: {why}") from error


def _awaited(call: Coroutine[Any, Any, Answer]) -> Answer:
    """Return what `call` gives, run in a thread of its own, since an event loop may be running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copy_context().run, asyncio.run, call).result()


def _fetched(block: str | AwsBlock) -> AwsBlock:
    """Return the block, fetched from the Prefect server where only its name is known."""
    if not isinstance(block, str):
        return block
    try:
        found: object = _awaited(Block.aload(block))
    except Exception as error:
        why = printable(str(error))[:200]
        raise StoreError(f"can't load the block {block}: {why}; is prefect-aws installed?") from error
    if not isinstance(found, AwsBlock):
        raise StoreError(f"the block {block} has no AWS credentials: name an aws-credentials block")
    return found


#: The block as it was when this process first fetched it.
_loaded = lru_cache(maxsize=32)(_fetched)


def _name_of(block: object) -> str | None:
    """Return the name that the block is saved under, None where it is not."""
    if not isinstance(block, Block):
        return None
    try:
        saved = block.get_block_placeholder()
    except BlockNotSavedError:
        return None
    return saved.removeprefix("prefect.blocks.").replace(".", "/", 1)
