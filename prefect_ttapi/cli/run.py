"""The command `run`: a file of prompts in, images in a folder or on S3 out, each paid for once.

prefect-ttapi run prompts.csv --store ./out
prefect-ttapi run prompts.csv --store s3://bucket/images --deliver s3://shop/assets --key "{name}-{size}.{ext}"
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict
from itertools import islice
from typing import Annotated, Any, Final, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed
from pydantic import Field

from prefect_ttapi.batch import (
    BatchReport,
    Budget,
    Estimate,
    Price,
    Prompts,
    check_batch,
    estimate_batch,
    generate_batch,
    read_prompts,
)
from prefect_ttapi.capabilities import Model
from prefect_ttapi.cli.arguments import Paying, Reading
from prefect_ttapi.cli.batches import batch_called, rows_of, without_images
from prefect_ttapi.cli.reporting import complain, place, say, waiting_for
from prefect_ttapi.cli.running import at_a_terminal, payer
from prefect_ttapi.cli.stores import (
    credentials_of,
    prices_of,
    provenance_of,
    standing_store,
    store_at,
    store_of,
)
from prefect_ttapi.credentials import ContentCredentialsSigner, TTAPICredentials
from prefect_ttapi.generation.temporary_server import start_server
from prefect_ttapi.lineage.shown import counted, one_line
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.layout import BATCHES, IMAGES
from prefect_ttapi.storage.store import ImageStore

# what the form of a deployment offers; it submits null only where null may be given
Size = Literal["auto", "1024x1024", "1536x1024", "1024x1536", "1792x1024", "1024x1792", "512x512", "256x256"]
Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]
Address = Annotated[str, Field(title="Address")]
Name = Annotated[str, Field(title="Name")]
Number = Annotated[int, Field(ge=0, title="Number")]
Amount = Annotated[float, Field(ge=0, title="Number")]
AtOnce = Annotated[int, Field(ge=1, le=1000)]

#: Rows without images that are told.
_SHOWN: Final = 20

#: The prompts that a command line has read already: a flow's parameters, which the server keeps, are no place for them.
_at_hand: ContextVar[Prompts | None] = ContextVar("ttapi_prompts_at_hand", default=None)


@flow(name="campaign", flow_run_name="campaign-{name}", persist_result=False)
def campaign(
    prompts: str,
    store: ImageStore | Address,
    name: str = "campaign",
    deliver: ImageStore | Address | None = None,
    key: str = "",
    overwrite: bool = False,
    mark: bool = False,
    sign: ContentCredentialsSigner | Name | None = None,
    credentials: TTAPICredentials | Name | None = None,
    model: Model = "dall-e-2",
    size: Size = "auto",
    quality: Quality = "auto",
    max_images: Number | None = None,
    max_usd: Amount | None = None,
    prices: Mapping[str, Any] = {},
    limit: Number | None = None,
    max_in_flight: AtOnce = 8,
    rate_limit: Amount | None = None,
    prompt_column: str = "",
    columns: Mapping[str, str | None] = {},
    defaults: Mapping[str, Any] = {},
    encoding: str = "",
    skip_blank: bool = False,
) -> State[BatchReport]:
    """Generate every prompt of a file into a store, and deliver copies under names that people know.

    Args:
        prompts: The file of prompts. Its columns are fields of a request, and any others can be used in the key.
        store: The block of the store that keeps the images, or a folder, s3://bucket/prefix or block:NAME.
        name: Name of the batch, by which people and later runs find it.
        deliver: The block of the store that copies go to, or a folder, s3://bucket/prefix or block:NAME. By default,
            nothing is copied.
        key: The template of the copies' names. By default, it is {slug}-{hash}-{index}.{ext}.
        overwrite: Replace whatever has a copy's name. Otherwise, nothing is paid for a request whose name is taken.
        mark: Mark copies of images that do not say themselves that a model made them, by XMP in the file.
        sign: The block of a signer, or its name, whose Content Credentials sign each copy. It implies the mark.
        credentials: The block with the API key, or its name. By default, TTAPI_API_KEY is used.
        model: The model for rows of the file that name none.
        size: The size of images for rows of the file that name none. Further sizes of gpt-image-2 go into the defaults.
        quality: The quality of images for rows of the file that name none. Each model knows some of them.
        max_images: How many images a run may pay for. The next run goes on from there.
        max_usd: How many US dollars a run may pay, by the prices below.
        prices: What a model costs in US dollars, for example {"gpt-image-2": {"per_image": 0.04}}. Instead of that,
            there can be per_million_input_tokens and per_million_output_tokens.
        limit: How many rows are read, from the beginning of the file. By default, all of them are.
        max_in_flight: How many requests may be in flight at once.
        rate_limit: How many requests may be sent per minute.
        prompt_column: The column that holds the prompts, if it is not called prompt.
        columns: The columns of a request's fields, for example {"size": "image_size", "model": null}. With null, no
            column is used.
        defaults: More fields of requests for rows that have none, for example {"output_format": "webp"}.
        encoding: The encoding of a text file that is not UTF-8.
        skip_blank: Skip rows without a prompt.
    """
    asked = {"model": model, "size": size, "quality": quality}
    given = _at_hand.get() or read_prompts(
        prompts,
        prompt_column=prompt_column or None,
        columns=columns,
        defaults={field: of for field, of in asked.items() if of != "auto"} | dict(defaults),
        limit=limit,
        encoding=encoding or None,
        skip_blank=skip_blank,
        key=key or None,
    )
    return batch_state(
        given.requests,
        store,
        credentials,
        values=given.values,
        budget=Budget(images=max_images, usd=max_usd, prices=dict(prices) or None),
        max_in_flight=max_in_flight,
        rate_limit=rate_limit,
        name=name,
        **copies_to(deliver, key, overwrite, mark, sign),
    )


def batch_state(
    requests: Sequence[ImageRequest],
    store: ImageStore | str,
    credentials: TTAPICredentials | str | None,
    note: str = "",
    **options: Any,
) -> State[BatchReport]:
    """Generate a batch; return the state that its flow ends in.

    Args:
        note: follows the summary in the state's message.
        options: of `generate_batch`.
    """
    report = generate_batch(
        requests, credentials_of(credentials), store_of(store), raise_on_failure=False, **options
    )
    # a Failed state and no exception: the report says what is wrong, a traceback would only hide it
    return (Completed if report.ok else Failed)(message=f"{report.summary}{note}", data=report)


def copies_to(
    deliver: ImageStore | str | None,
    key: str | None,
    overwrite: bool,
    mark: bool,
    sign: ContentCredentialsSigner | str | None,
) -> dict[str, Any]:
    """Return the options of `generate_batch` for copies, as a form or a command line asks for them.

    Raises:
        ValueError: there is a key, and no place to deliver to; or there is no such block.
    """
    if key and not deliver:
        raise ValueError("a key is given, but no place to deliver to: say --deliver, or leave out --key")
    return {
        "deliver_to": store_of(deliver) if deliver else None,
        "key": key or DEFAULT_KEY,
        "overwrite": overwrite,
        "provenance": provenance_of(mark, sign),
    }


def run(path: str, address: str, paying: Paying, reading: Reading) -> int:
    """Generate and deliver; return the exit status."""
    file = asdict(reading) | {"key": paying.key}
    file["columns"] = {field: name for part in reading.columns for field, name in _columns(part).items()}
    file["defaults"] = {field: of for field in ("model", "size") if (of := file.pop(field))}
    with at_a_terminal():
        options, given = _options(paying, "campaign"), read_prompts(path, **file)
        say(*given.notes)
        with payer(paying) as credentials:
            batch = {"requests": given.requests, "credentials": credentials, "store": store_at(address)}
            if not _may_start(paying, batch | {"values": given.values} | options):
                return 0
            prices: Mapping[Model, Price] = options["budget"].prices or {}
            told = asdict(paying) | file | {"name": options["name"]}
            told["prices"] = {model: price.model_dump() for model, price in prices.items()}
            # the server keeps what a flow is given: of a key that costs something, only the name of its block
            told["credentials"] = credentials if paying.sandbox else paying.credentials
            fields = campaign.parameters.properties
            form = {field: value for field, value in told.items() if field in fields and value is not None}
            read = _at_hand.set(given)
            try:
                state = campaign(path, address, **form, return_state=True)
            finally:
                _at_hand.reset(read)
            names = [f"line {line}" for line in given.lines]
            return tell(state.result(raise_on_failure=False), paying.deliver, names)


def retry(address: str, wanted: str | None, paying: Paying) -> int:
    """Ask again for what failed in a batch; return the exit status."""
    with at_a_terminal():
        store = standing_store(address)
        batch = batch_called(store, wanted)
        rows = [*without_images(rows_of(store, batch))]
        legal = [row for row in rows if row.request]
        if illegal := len(rows) - len(legal):
            told = f"{counted(illegal, 'request')} of the batch can't be asked for as they are"
            say(f"{told}: correct the prompts file.")
        if not legal:
            say(f"Nothing is to be asked for again in the batch {batch.id}.")
            return 1 if illegal else 0
        say(f"Asked for again: {counted(len(legal), 'request')} of the batch {batch.id}.")
        with payer(paying) as credentials:
            again: dict[str, Any] = {
                "requests": [row.request for row in legal],
                "credentials": credentials,
                "store": store,
                "values": [row.values for row in legal],
            } | _options(paying, batch.name or "retry")
            if not _may_start(paying, again):
                return 0
            report = generate_batch(**again, raise_on_failure=False)
            return tell(report, paying.deliver, [f"request {row.row}" for row in legal])


def _options(paying: Paying, name: str) -> dict[str, Any]:
    """Return the options of `generate_batch` that a command line gives; `name` is the batch's, if it gives none."""
    prices = prices_of(paying.price, paying.max_usd)
    return {
        "budget": Budget(images=paying.max_images, usd=paying.max_usd, prices=prices or None),
        "max_in_flight": paying.max_in_flight,
        "rate_limit": paying.rate_limit,
        "name": paying.name or name,
    } | copies_to(paying.deliver, paying.key, paying.overwrite, paying.mark, paying.sign)


def _may_start(paying: Paying, batch: Mapping[str, Any]) -> bool:
    """Check a batch, and start Prefect's server for it; of a dry run, tell what was found instead, and return False.

    Prefect logs a traceback for what goes wrong inside a flow, so all that can be known is found before it.

    Args:
        batch: what `check_batch` takes.
    """
    intake = check_batch(**batch)
    if paying.dry_run:
        asked = {name: value for name, value in batch.items() if name not in ("requests", "values")}
        say(*_estimated(estimate_batch(intake, **asked), batch["budget"].prices or {}, paying.max_images))
        return False
    with waiting_for("Starting Prefect's server"):
        start_server()
    return True


def _columns(text: str) -> dict[str, str | None]:
    """Return the columns by field that `size=image_size,model=` names."""
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+\s*=)", text)]  # names may have commas
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"--columns {text} is written like --columns size=image_size,model=")
    return {field.strip(): name.strip() or None for field, _, name in pairs}


def _estimated(estimate: Estimate, prices: Mapping[Model, Price], most: int | None) -> Iterator[str]:
    """Yield what a dry run found, and what the rest costs."""
    yield str(estimate)
    if not estimate.images:
        yield "Nothing is to be paid for."
        return
    usd = estimate.usd(prices)
    if usd is not None:
        money = f"{usd:,.2f} USD"
    elif any(price.per_million_output_tokens for price in prices.values()):
        money = "in money unknown: only the answers tell the tokens"
    else:
        money = "in money unknown: give each model's --price to see the money"
    yield f"To be paid for: {counted(estimate.images, 'image')}, {money}"
    if most is not None and most < estimate.images:
        yield f"--max-images {most} leaves {counted(estimate.images - most, 'image')} at least to the next run."


def tell(report: object, deliver: str | None, names: Sequence[str]) -> int:
    """Say what became of a batch, and where things are; return the exit status.

    Args:
        report: of the batch; anything else is why there is none.
        deliver: where copies went, as it was given.
        names: what each request is called.
    """
    if not isinstance(report, BatchReport):
        complain(f"the run ended without a report: {report}")
        return 1
    say("", *_summary(report), "", *_places(report, deliver))
    for line in _failures(report, names):
        print(line, file=sys.stderr)
    return 0 if report.ok else 1


def _summary(report: BatchReport) -> Iterator[str]:
    totals = report.totals
    yield report.summary
    paid = totals.images - totals.images_cached
    money = f", {totals.usd:,.2f} USD" if totals.usd is not None else ""
    if paid:
        yield f"Paid for {counted(paid, 'image')} in {counted(totals.api_calls, 'call')}{money}."
    else:
        all_there = ": every image was in the store already" if totals.images and report.ok else ""
        yield f"Nothing was paid for{all_there}."
    if report.unchanged:
        yield report.unchanged
    yield from report.notes
    if totals.maybe_paid:
        asked = counted(totals.maybe_paid, "request")
        yield f"{asked} may have been paid for without giving images: see maybe_paid in the manifest."


def _places(report: BatchReport, deliver: str | None) -> Iterator[str]:
    store = report.manifest_uri.rpartition(f"/{BATCHES}")[0]
    yield f"Images     {place(f'{store}/{IMAGES}'.rstrip('/'))}"
    if deliver and report.totals.delivered:
        copies = counted(report.totals.delivered, "file")
        yield f"Delivered  {place(store_at(deliver).uri('x').removesuffix('/x'))} ({copies})"
    yield f"Gallery    {place(report.gallery_uri) if report.gallery_uri else 'could not be written'}"
    yield f"Manifest   {place(report.manifest_uri)}"
    yield f"Run        {_run_url(report.flow_run_id)}"
    if report.gallery_uri:
        yield f"To look at the images: prefect-ttapi open {shlex.quote(place(store))}"


def _run_url(flow_run_id: str) -> str:
    """Return where the Prefect UI shows a run; without a server of its own, how to get one."""
    if ui := get_current_settings().ui_url:
        return f"{ui.rstrip('/')}/runs/flow-run/{flow_run_id}"
    home = f"PREFECT_HOME={shlex.quote(os.environ['PREFECT_HOME'])} " if "PREFECT_HOME" in os.environ else ""
    return f"`{home}prefect server start`, then http://127.0.0.1:4200/runs/flow-run/{flow_run_id}"


def _failures(report: BatchReport, names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each of the first rows without their images."""
    for row in islice(without_images(report.rows), _SHOWN):
        name = f" ({one_line(known, 60)})" if (known := row.values.get("name")) else ""
        yield f"{names[row.row]}{name} {row.status}: {row.error}"
    more = report.totals.failed + report.totals.skipped - _SHOWN
    if more > 0:
        yield f"and {more} more, in the manifest"
