"""Flows to deploy by their module paths, beside `prefect_ttapi.cli.run:campaign`: what follows a campaign, and a form.

prefect_ttapi.cli.flows:retry    asks again for what failed in the newest batch of a name
prefect_ttapi.cli.flows:images   makes the images of a few prompts that somebody fills into a form
prefect_ttapi.cli.flows:review   is a failed run, with the reasons, where a batch lacks images
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from prefect_ttapi import errors
from prefect_ttapi.batch import BatchReport, Budget, generate_batch
from prefect_ttapi.capabilities import Model
from prefect_ttapi.cli.batches import batches_of, rows_of
from prefect_ttapi.cli.run import NOT_DELIVERED, Address, Amount, AtOnce, Name, Number, Quality, Size
from prefect_ttapi.cli.running import credentials_of
from prefect_ttapi.cli.stores import store_at, store_of
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.layout import BATCHES
from prefect_ttapi.storage.store import ImageStore

#: Rows that one message names.
_SHOWN: Final = 20

#: It would be refused again, for which accounts are closed; its key is taken; or it has to wait for the next budget.
_IN_VAIN: Final = {
    kind.__name__
    for kind in (
        errors.InvalidRequestError,
        errors.ModerationError,
        errors.ModelNotPermittedError,
        errors.KeyTakenError,
        errors.BudgetExceeded,
    )
}
#: Of what may have been paid for: it hardly is, or its answer is kept, so that nothing is sent for it again.
_HARMLESS: Final = {kind.__name__ for kind in (errors.ServerError, errors.DownloadError)}

_Prompt = Annotated[str, Field(min_length=1, title="Prompt")]


@flow(name="retry", flow_run_name="retry-{name}", persist_result=False)
def retry(
    store: ImageStore | Address,
    name: str = "campaign",
    deliver: ImageStore | Address | None = None,
    key: str = "",
    credentials: TTAPICredentials | Name | None = None,
    max_images: Number | None = None,
    max_usd: Amount | None = None,
    prices: Mapping[str, Any] = {},
    max_in_flight: AtOnce = 8,
    rate_limit: Amount | None = None,
    also_perhaps_paid: bool = False,
) -> State[BatchReport]:
    """Ask again for what failed in the newest batch of a name, as a new batch of that name.

    What would be refused again, what a budget left over, and what may have been paid for is left to the next campaign,
    or to a person.

    Args:
        store: The batch is in this block, or in a folder, s3://bucket/prefix or block:NAME.
        name: The newest batch that is called so is looked at.
        deliver: Copies go to this block, or to a folder, s3://bucket/prefix or block:NAME. By default, there are none.
        key: The copies get names from this template. Without it, it is {slug}-{hash}-{index}.{ext}.
        credentials: The API key is in this block, or in the block of this name. Without it, TTAPI_API_KEY is used.
        max_images: A run pays for so many images at most.
        max_usd: A run pays so many USD at most, by the prices below.
        prices: What a model costs in USD, for example {"gpt-image-2": {"per_image": 0.04}}.
        max_in_flight: So many requests are under way at once.
        rate_limit: So many requests are sent per minute at most.
        also_perhaps_paid: Requests that may have been paid for without giving images are sent again, too. They may
            then be paid for twice.
    """
    place = store_of(store)
    rows = _missing(_newest(place, name))
    again = [(row, row.request) for row in rows if row.request and is_worth_it(row, also_perhaps_paid)]
    kinds = Counter(row.error_type for row in rows if not is_worth_it(row, also_perhaps_paid))
    left = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    note = f" What is left to the next campaign, or to a person: {left}." if left else ""
    if not again:
        return Completed(message=f"Nothing is to be asked for again.{note}")
    return _batch(
        [request for _, request in again],
        place,
        deliver,
        key,
        note,
        credentials=credentials_of(credentials),
        values=[row.values for row, _ in again],
        budget=Budget(images=max_images, usd=max_usd, prices=dict(prices) or None),
        max_in_flight=max_in_flight,
        rate_limit=rate_limit,
        name=name,
    )


def _newest(store: ImageStore, name: str) -> Iterable[Row]:
    found = next((batch for batch in batches_of(store) if batch.name == name), None)
    return rows_of(store, found) if found else ()


def _missing(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.status in ("failed", "skipped")]


def is_worth_it(row: Row, also_perhaps_paid: bool) -> bool:
    """Return whether a request without images may be sent again without a person's word."""
    if row.request is None or row.error_type in _IN_VAIN:
        return False
    return bool(row.images) or not row.maybe_paid or also_perhaps_paid or row.error_type in _HARMLESS


@flow(name="images", flow_run_name="images-{name}", persist_result=False)
def images(
    prompts: Annotated[list[_Prompt], Field(min_length=1, max_length=100)],
    store: ImageStore | Address,
    name: str = "on-demand",
    model: Model = "gpt-image-2",
    size: Size = "auto",
    quality: Quality = "auto",
    n: Annotated[int, Field(ge=1, le=10, title="Number of images")] = 1,
    output_format: Literal["png", "jpeg", "webp"] = "png",
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100,
    background: Literal["auto", "transparent", "opaque"] = "auto",
    moderation: Literal["auto", "low"] = "auto",
    deliver: ImageStore | Address | None = None,
    key: str = "",
    credentials: TTAPICredentials | Name | None = None,
    max_images: Annotated[int, Field(ge=1, le=1000)] = 100,
    max_in_flight: AtOnce = 8,
) -> State[BatchReport]:
    """Make the images of a few prompts, each paid for once. For more prompts, there is the campaign with its file.

    Args:
        prompts: Each of these becomes a request of its own.
        store: Images are kept in this block, or in a folder, s3://bucket/prefix or block:NAME.
        name: The batch is called so.
        model: This model makes the images.
        size: Images get this size. Each model knows some of them.
        quality: Images get this quality. Each model knows some of them.
        n: Each prompt gets so many images.
        output_format: GPT Image models make files of this type.
        output_compression: GPT Image models compress jpeg and webp files to this quality.
        background: GPT Image models make it transparent only in png and webp files.
        moderation: With low, GPT Image models refuse fewer prompts.
        deliver: Copies go to this block, or to a folder, s3://bucket/prefix or block:NAME. By default, there are none.
        key: The copies get names from this template. Without it, it is {slug}-{hash}-{index}.{ext}.
        credentials: The API key is in this block, or in the block of this name. Without it, TTAPI_API_KEY is used.
        max_images: The run pays for so many images at most.
        max_in_flight: So many requests are under way at once.
    """
    asked = {
        "model": model,
        "size": size,
        "quality": quality,
        "n": n,
        "output_format": output_format,
        "output_compression": output_compression,
        "background": background,
        "moderation": moderation,
    }
    return _batch(
        [ImageRequest.model_validate({"prompt": prompt} | asked) for prompt in prompts],
        store_of(store),
        deliver,
        key,
        credentials=credentials_of(credentials),
        budget=Budget(images=max_images),
        max_in_flight=max_in_flight,
        name=name,
    )


def _batch(
    requests: list[ImageRequest],
    store: ImageStore,
    deliver: ImageStore | str | None,
    key: str,
    note: str = "",
    **options: Any,
) -> State[BatchReport]:
    if key and not deliver:
        raise ValueError(NOT_DELIVERED)
    report = generate_batch(
        requests,
        store=store,
        deliver_to=store_of(deliver) if deliver else None,
        key=key or DEFAULT_KEY,
        raise_on_failure=False,
        **options,
    )
    return (Completed if report.ok else Failed)(message=f"{report.summary}{note}", data=report)


@flow(name="review", persist_result=False)
def review(manifest: str, store: ImageStore | Address | None = None) -> State[None]:
    """Fail, with the reasons, where requests of a batch have no images.

    Args:
        manifest: This is the address of the manifest, as the event ttapi.batch.completed tells it.
        store: The manifest is read with the settings of this block. Without it, those of the environment are used.
    """
    folder = store_at(manifest.rpartition(f"/{BATCHES}")[0])
    place = store_of(store).model_copy(update={"url": folder.url}) if store else folder
    with place.open(manifest) as lines:
        rows = list(read_manifest(lines))
    reasons = [f"request {row.row}: {row.error_type}: {row.error}" for row in _missing(rows)]
    if reasons:
        more = [f"and {len(reasons) - _SHOWN:,} more"] if len(reasons) > _SHOWN else []
        told = [f"{counted(len(rows), 'request')}, of which these lack images:", *reasons[:_SHOWN], *more]
        return Failed(message="\n".join(told))
    return Completed(message=f"All {len(rows)} requests have their images.")
