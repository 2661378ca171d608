"""What a command line or a form names: stores, objects, saved blocks and prices; and the ledger's documents there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar, cast

from prefect.blocks.core import Block
from prefect.settings import temporary_settings
from pydantic import ValidationError

from prefect_ttapi.capabilities import MODELS, Model
from prefect_ttapi.credentials import ContentCredentialsSigner, TTAPICredentials
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.budget import Budget, Price
from prefect_ttapi.generation.files import Provenance
from prefect_ttapi.generation.temporary_server import TEMPORARY_SERVER
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.objects import NoAnswerError
from prefect_ttapi.storage.store import ImageStore

_B = TypeVar("_B", bound=Block)


def store_at(address: str, endpoint_url: str | None = None) -> ImageStore:
    """Return the store at a folder or `s3://bucket/prefix`, or the saved block `block:NAME`.

    Args:
        endpoint_url: of an S3 service other than AWS, in place of the block's or the environment's.

    Raises:
        ValueError: that is no address, or there is no such block.

    >>> store_at("s3://pictures/2031", "https://minio.example.com").identity
    's3://pictures/2031 at https://minio.example.com'
    """
    kind, _, name = address.partition(":")
    try:
        if kind != "block":
            return ImageStore(url=address, endpoint_url=endpoint_url)
        store = _saved(ImageStore, name)
        return store.model_copy(update={"endpoint_url": endpoint_url}) if endpoint_url else store
    except ValidationError as error:
        raise ValueError("; ".join(problem["msg"] for problem in error.errors(include_input=False))) from None


def store_of(given: ImageStore | str) -> ImageStore:
    """Return the store, or the one at an address: what a form gives is either."""
    return given if isinstance(given, ImageStore) else store_at(given)


def standing_store(address: str, endpoint_url: str | None = None) -> ImageStore:
    """Return a store to look into, of which a folder has to be there.

    Raises:
        ValueError: it is not, that is no address, or there is no such block.
    """
    store = store_at(address, endpoint_url)
    if not layout.is_s3(store.url) and not Path(store.url).is_dir():
        raise ValueError(f"there is no folder {store.url}: is the store elsewhere?")
    return store


def object_at(uri: str, endpoint_url: str | None) -> tuple[ImageStore, str]:
    """Return a store through which the object of this address can be read, and its key there."""
    if layout.is_s3(uri):
        bucket, key = layout.bucket_and_prefix(uri)
        return store_at(layout.s3_uri(bucket), endpoint_url), key
    path = Path(layout.normalised(uri))
    key_by_root = {root: path.relative_to(root).as_posix() for root in path.parents}
    described = (root for root, key in key_by_root.items() if (root / layout.sidecar_key(key)).is_file())
    root = next(described, path.parent)
    return ImageStore(url=str(root)), key_by_root[root]


def document_keys(store: ImageStore) -> Iterator[str]:
    """Return the keys of the ledger's documents, of all API origins."""
    return (listed.key for listed in store.list(layout.LEDGER) if layout.document_in(listed.key))


@contextmanager
def passing_over_nonsense() -> Iterator[None]:
    """Pass over what can't be read, or makes no sense; a store that gives no answer is still an error."""
    try:
        yield
    except NoAnswerError:
        raise
    except (StoreError, ValueError):
        pass


def credentials_of(given: TTAPICredentials | str | None) -> TTAPICredentials:
    """Return the block, or the saved one of this name, else what the environment says."""
    if isinstance(given, TTAPICredentials):
        return given
    return _saved(TTAPICredentials, given) if given else TTAPICredentials.from_env()


def provenance_of(mark: bool, signer: ContentCredentialsSigner | str | None) -> Provenance | None:
    """Return what delivered files get; None where they get nothing.

    Args:
        mark: mark copies.
        signer: a block, or the name of a saved one, to sign with, too.
    """
    if isinstance(signer, str):
        signer = _saved(ContentCredentialsSigner, signer) if signer else None
    return Provenance(sign=signer) if mark or signer else None


def _saved(kind: type[_B], name: str) -> _B:
    """Return the saved block of this name. ValueError: there is none."""
    with temporary_settings(set_defaults=TEMPORARY_SERVER):
        return cast(_B, kind.load(name))  # which could also be awaited, where a loop runs


def prices_of(given: Iterable[str], most: float | None = None) -> Mapping[Model, Price]:
    """Return prices by model.

    Args:
        most: the limit in USD that a command line sets, which needs them.

    >>> prices_of(["gpt-image-2=0.04", "gpt-image-1=5/40"])["gpt-image-1"].per_million_output_tokens
    40.0

    Raises:
        ValueError: one is written in another way, or there is none for the limit.
    """
    prices: dict[Model, Price] = {}
    for text in given:
        model, _, usd = text.partition("=")
        names = _PRICES[:2] if "/" in usd else _PRICES[2:]
        try:
            price = dict(zip(names, usd.split("/"), strict=True))
            prices |= Budget.model_validate({"prices": {model: price}}).prices or {}
        except ValueError:
            raise ValueError(
                f"{text!r} is no price: write gpt-image-2=0.04, or gpt-image-2=5/40; models: {', '.join(MODELS)}"
            ) from None
    if most is not None and not prices:
        raise ValueError("--max-usd needs a price for each model, as --price gpt-image-2=0.04")
    return prices


_PRICES: Final = ("per_million_input_tokens", "per_million_output_tokens", "per_image")
