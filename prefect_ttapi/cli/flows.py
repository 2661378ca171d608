"""Flows to deploy by their module paths, beside `prefect_ttapi.cli.run:campaign`: what follows a campaign, and a form.

prefect_ttapi.cli.flows:retry    asks again for what failed in the newest batch of a name
prefect_ttapi.cli.flows:images   makes the images of a few prompts that somebody fills into a form
prefect_ttapi.cli.flows:review   is a failed run, with the reasons, where a batch lacks images
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from prefect_ttapi import errors
from prefect_ttapi.batch import BatchReport, Budget
from prefect_ttapi.capabilities import Model
from prefect_ttapi.cli.batches import batches_of, rows_of, without_images
from prefect_ttapi.cli.run import Address, Amount, AtOnce, Name, Number, Quality, Size, batch_state, copies_to
from prefect_ttapi.cli.stores import store_at, store_of
from prefect_ttapi.credentials import ContentCredentialsSigner, TTAPICredentials
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.requests import ImageRequest
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
    overwrite: bool = False,
    mark: bool = False,
    sign: ContentCredentialsSigner | Name | None = None,
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
        store: The block of the store that holds the batch, or a folder, s3://bucket/prefix or block:NAME.
        name: Name of the batch. If there are several of this name, the newest is looked at.
        deliver: The block of the store that copies go to, or a folder, s3://bucket/prefix or block:NAME. By default,
            nothing is copied.
        key: The template of the copies' names. By default, it is {slug}-{hash}-{index}.{ext}.
        overwrite: Replace whatever has a copy's name. Otherwise, nothing is paid for a request whose name is taken.
        mark: Mark copies of images that do not say themselves that a model made them, by XMP in the file.
        sign: The block of a signer, or its name, whose Content Credentials sign each copy. It implies the mark.
        credentials: The block with the API key, or its name. By default, TTAPI_API_KEY is used.
        max_images: How many images a run may pay for.
        max_usd: How many US dollars a run may pay, by the prices below.
        prices: What a model costs in US dollars, for example {"gpt-image-2": {"per_image": 0.04}}.
        max_in_flight: How many requests may be in flight at once.
        rate_limit: How many requests may be sent per minute.
        also_perhaps_paid: Requests that may have been paid for without giving images are sent again, too. They may
            then be paid for twice.
    """
    place = store_of(store)
    newest = next((batch for batch in batches_of(place) if batch.name == name), None)
    rows = [*without_images(rows_of(place, newest))] if newest else []
    again = [(row, row.request) for row in rows if row.request and is_worth_it(row, also_perhaps_paid)]
    kinds = Counter(row.error_type for row in rows if not is_worth_it(row, also_perhaps_paid))
    left = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    note = f" What is left to the next campaign, or to a person: {left}." if left else ""
    if not again:
        return Completed(message=f"Nothing is to be asked for again.{note}")
    return batch_state(
        [request for _, request in again],
        place,
        credentials,
        note,
        values=[row.values for row, _ in again],
        budget=Budget(images=max_images, usd=max_usd, prices=dict(prices) or None),
        max_in_flight=max_in_flight,
        rate_limit=rate_limit,
        name=name,
        **copies_to(deliver, key, overwrite, mark, sign),
    )


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
    overwrite: bool = False,
    mark: bool = False,
    sign: ContentCredentialsSigner | Name | None = None,
    credentials: TTAPICredentials | Name | None = None,
    max_images: Annotated[int, Field(ge=1, le=1000)] = 100,
    max_in_flight: AtOnce = 8,
) -> State[BatchReport]:
    """Make the images of a few prompts, each paid for once. For more prompts, there is the campaign with its file.

    Args:
        prompts: The prompts, each of which becomes a request of its own.
        store: The block of the store that keeps the images, or a folder, s3://bucket/prefix or block:NAME.
        name: Name of the batch, by which people and later runs find it.
        model: The model that makes the images.
        size: The size of the images. Each model knows some of them.
        quality: The quality of the images. Each model knows some of them.
        n: How many images each prompt gets.
        output_format: The type of the files that GPT Image models make.
        output_compression: The quality to which GPT Image models compress jpeg and webp files.
        background: The background that GPT Image models draw. It can be transparent in png and webp files only.
        moderation: How strictly GPT Image models refuse prompts. With low, they refuse fewer.
        deliver: The block of the store that copies go to, or a folder, s3://bucket/prefix or block:NAME. By default,
            nothing is copied.
        key: The template of the copies' names. By default, it is {slug}-{hash}-{index}.{ext}.
        overwrite: Replace whatever has a copy's name. Otherwise, nothing is paid for a request whose name is taken.
        mark: Mark copies of images that do not say themselves that a model made them, by XMP in the file.
        sign: The block of a signer, or its name, whose Content Credentials sign each copy. It implies the mark.
        credentials: The block with the API key, or its name. By default, TTAPI_API_KEY is used.
        max_images: How many images the run may pay for.
        max_in_flight: How many requests may be in flight at once.
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
    return batch_state(
        [ImageRequest.model_validate({"prompt": prompt} | asked) for prompt in prompts],
        store,
        credentials,
        budget=Budget(images=max_images),
        max_in_flight=max_in_flight,
        name=name,
        **copies_to(deliver, key, overwrite, mark, sign),
    )


@flow(name="review", persist_result=False)
def review(manifest: str, store: ImageStore | Address | None = None) -> State[None]:
    """Fail, with the reasons, where requests of a batch have no images.

    Args:
        manifest: The address of the manifest, as the event ttapi.batch.completed tells it.
        store: The block with the settings by which the manifest is read. By default, those of the environment are used.
    """
    folder = store_at(manifest.rpartition(f"/{BATCHES}")[0])
    place = store_of(store).model_copy(update={"url": folder.url}) if store else folder
    with place.open(manifest) as lines:
        rows = list(read_manifest(lines))
    reasons = [f"request {row.row}: {row.error_type}: {row.error}" for row in without_images(rows)]
    if reasons:
        more = [f"and {len(reasons) - _SHOWN:,} more"] if len(reasons) > _SHOWN else []
        told = [f"{counted(len(rows), 'request')}, of which these lack images:", *reasons[:_SHOWN], *more]
        return Failed(message="\n".join(told))
    return Completed(message=f"All {len(rows)} requests have their images.")
