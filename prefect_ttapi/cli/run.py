"""The command `run`: a file of prompts in, images in a folder or on S3 out, each paid for once.

prefect-ttapi run prompts.csv --store ./out
prefect-ttapi run prompts.csv --store s3://bucket/images --deliver s3://shop/assets --key "{name}-{size}.{ext}"
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
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
from prefect_ttapi.cli.batches import batch_called, rows_of
from prefect_ttapi.cli.commands import Paying, Reading
from prefect_ttapi.cli.reporting import complain, say, waiting_for
from prefect_ttapi.cli.running import (
    credentials_of,
    exit_status,
    failures,
    place,
    provenance_of,
    run_url,
    sandbox_if,
)
from prefect_ttapi.cli.stores import prices_of, standing_store, store_at, store_of
from prefect_ttapi.credentials import ContentCredentialsSigner, TTAPICredentials
from prefect_ttapi.generation.temporary_server import start_server
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.layout import BATCHES, IMAGES
from prefect_ttapi.storage.store import ImageStore

NOT_DELIVERED = "a key is given, but no place to deliver to: say --deliver, or leave out --key"


# what the form of a deployment offers; it submits null only where null may be given
Size = Literal["auto", "1024x1024", "1536x1024", "1024x1536", "1792x1024", "1024x1792", "512x512", "256x256"]
Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]
Address = Annotated[str, Field(title="Address")]
Name = Annotated[str, Field(title="Name")]
Number = Annotated[int, Field(ge=0, title="Number")]
Amount = Annotated[float, Field(ge=0, title="Number")]
AtOnce = Annotated[int, Field(ge=1, le=1000)]

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
        store: Images are kept in this block, or in a folder, s3://bucket/prefix or block:NAME.
        name: The batch is called so.
        deliver: Copies go to this block, or to a folder, s3://bucket/prefix or block:NAME. By default, there are none.
        key: The copies get names from this template. Without it, it is {slug}-{hash}-{index}.{ext}.
        overwrite: Copies replace what has their names. Otherwise, nothing is paid for a request whose name is taken.
        mark: Copies of images that don't say themselves that a model made them get XMP that says so.
        sign: Copies get Content Credentials, signed by this block, or by the block of this name, and the XMP, too.
        credentials: The API key is in this block, or in the block of this name. Without it, TTAPI_API_KEY is used.
        model: This model answers where a row of the file names none.
        size: Images get this size where a row of the file has none. More sizes of gpt-image-2 can be said in defaults.
        quality: Images get this quality where a row of the file has none. Each model knows some of them.
        max_images: A run pays for so many images at most. The next run goes on from there.
        max_usd: A run pays so many USD at most, by the prices below.
        prices: What a model costs in USD, for example {"gpt-image-2": {"per_image": 0.04}}. Instead of that, there
            can be per_million_input_tokens and per_million_output_tokens.
        limit: Only so many rows from the beginning of the file are used.
        max_in_flight: So many requests are under way at once.
        rate_limit: So many requests are sent per minute at most.
        prompt_column: The prompts are in this column, if it is not called prompt.
        columns: Columns of a request's fields, for example {"size": "image_size", "model": null}. With null, no
            column is used.
        defaults: More fields of requests for rows that have none, for example {"output_format": "webp"}.
        encoding: The encoding of a text file that is not UTF-8.
        skip_blank: Rows without a prompt are passed over.
    """
    if key and not deliver:
        raise ValueError(NOT_DELIVERED)
    asked = {"size": size, "quality": quality}
    given = _at_hand.get() or read_prompts(
        prompts,
        prompt_column=prompt_column or None,
        columns=columns,
        defaults={"model": model}
        | {field: of for field, of in asked.items() if of != "auto"}
        | dict(defaults),
        limit=limit,
        encoding=encoding or None,
        skip_blank=skip_blank,
        key=key or None,
    )
    report = generate_batch(
        given.requests,
        credentials_of(credentials),
        store_of(store),
        deliver_to=store_of(deliver) if deliver else None,
        key=key or DEFAULT_KEY,
        overwrite=overwrite,
        provenance=provenance_of(mark, sign),
        values=given.values,
        max_in_flight=max_in_flight,
        budget=Budget(images=max_images, usd=max_usd, prices=dict(prices) or None),
        rate_limit=rate_limit,
        name=name,
        raise_on_failure=False,
    )
    # a Failed state and no exception: the report says what is wrong, a traceback would only hide it
    return (Completed if report.ok else Failed)(message=report.summary, data=report)


def run(prompts: str, store: str, paying: Paying, reading: Reading) -> int:
    """Generate and deliver; return the exit status."""
    return exit_status(lambda: _run(prompts, store, paying, reading))


def _run(path: str, address: str, paying: Paying, reading: Reading) -> int:
    with sandbox_if(paying.sandbox, content_credentials=paying.content_credentials):
        if paying.max_usd is not None and not paying.price:
            raise ValueError("--max-usd needs a price for each model, as --price gpt-image-2=0.04")
        if paying.key and not paying.deliver:
            raise ValueError(NOT_DELIVERED)
        file: dict[str, Any] = {
            "prompt_column": reading.prompt_column,
            "columns": {field: name for part in reading.columns for field, name in _columns(part).items()},
            "defaults": {name: value for name in ("model", "size") if (value := getattr(reading, name))},
            "limit": reading.limit,
            "encoding": reading.encoding,
            "skip_blank": reading.skip_blank,
            "key": paying.key,
        }
        given = read_prompts(path, **file)
        say(*given.notes)
        name = paying.name or "campaign"
        if _is_dry(given.requests, given.values, store_at(address), paying, name):
            return 0
        passed_on = (
            "deliver",
            "credentials",
            "max_in_flight",
            "max_images",
            "max_usd",
            "rate_limit",
            "overwrite",
            "mark",
            "sign",
        )
        settings = file | {"name": name} | {option: getattr(paying, option) for option in passed_on}
        settings["prices"] = {model: price.model_dump() for model, price in prices_of(paying.price).items()}
        with waiting_for("Starting Prefect's server"):
            start_server()
        read = _at_hand.set(given)
        try:
            state = campaign(path, address, **_given(settings), return_state=True)
        finally:
            _at_hand.reset(read)
        names = [f"line {line}" for line in given.lines]
        return tell(state.result(raise_on_failure=False), paying.deliver, names)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _options(paying: Paying, name: str) -> dict[str, Any]:
    """Return the options of `generate_batch` that a command line gives."""
    budget = Budget(images=paying.max_images, usd=paying.max_usd, prices=prices_of(paying.price) or None)
    return {
        "deliver_to": store_at(paying.deliver) if paying.deliver else None,
        "key": paying.key or DEFAULT_KEY,
        "overwrite": paying.overwrite,
        "provenance": provenance_of(paying.mark, paying.sign),
        "max_in_flight": paying.max_in_flight,
        "budget": budget,
        "rate_limit": paying.rate_limit,
        "name": name,
    }


def _is_dry(
    requests: Sequence[ImageRequest],
    values: Sequence[Mapping[str, Any]],
    store: ImageStore,
    paying: Paying,
    name: str,
) -> bool:
    """Check a batch; for a dry run, tell what it would do, and return True.

    Prefect logs a traceback for what goes wrong inside a flow, so all that can be known is found before it.
    """
    credentials = credentials_of(paying.credentials)
    options = _options(paying, name)
    intake = check_batch(requests, credentials, store, values=values, **options)
    if paying.dry_run:
        estimate = estimate_batch(intake, credentials, store, **options)
        say(*_estimated(estimate, prices_of(paying.price), paying.max_images))
    return paying.dry_run


def retry(address: str, wanted: str | None, paying: Paying) -> int:
    """Ask again for what failed in a batch; return the exit status."""
    return exit_status(lambda: _retry(address, wanted, paying))


def _retry(address: str, wanted: str | None, paying: Paying) -> int:
    with sandbox_if(paying.sandbox, content_credentials=paying.content_credentials):
        store = standing_store(address)
        batch = batch_called(store, wanted)
        rows = [row for row in rows_of(store, batch) if row.status in ("failed", "skipped")]
        legal = [(row, row.request) for row in rows if row.request]
        if illegal := len(rows) - len(legal):
            say(
                f"{counted(illegal, 'request')} of the batch can't be asked for as they are: correct the prompts file."
            )
        if not legal:
            say(f"Nothing is to be asked for again in the batch {batch.id}.")
            return 1 if illegal else 0
        say(f"Asked for again: {counted(len(legal), 'request')} of the batch {batch.id}.")
        requests, values = [request for _, request in legal], [row.values for row, _ in legal]
        name = paying.name or batch.name or "retry"
        if paying.key and not paying.deliver:
            raise ValueError(NOT_DELIVERED)
        if _is_dry(requests, values, store, paying, name):
            return 0
        with waiting_for("Starting Prefect's server"):
            start_server()
        credentials, options = credentials_of(paying.credentials), _options(paying, name)
        report = generate_batch(
            requests, credentials, store, values=values, raise_on_failure=False, **options
        )
        return tell(report, paying.deliver, [f"request {row.row}" for row, _ in legal])


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
    by_tokens = any(price.per_million_output_tokens for price in prices.values())
    unknown = (
        "only the answers tell the tokens" if by_tokens else "give each model's --price to see the money"
    )
    yield f"To be paid for: {counted(estimate.images, 'image')}, " + (
        f"{usd:,.2f} USD" if usd is not None else f"in money unknown: {unknown}"
    )
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
    for line in failures(report, names):
        print(line, file=sys.stderr)
    return 0 if report.ok else 1


def _summary(report: BatchReport) -> Iterator[str]:
    totals = report.totals
    yield report.summary
    paid = totals.images - totals.images_cached
    money = f", {totals.usd:,.2f} USD" if totals.usd is not None else ""
    if paid:
        yield f"Paid for {counted(paid, 'image')} in {counted(totals.api_calls, 'call')}{money}."
    elif totals.images and report.ok:
        yield "Nothing was paid for: every image was in the store already."
    else:
        yield "Nothing was paid for."
    if report.unchanged:
        yield report.unchanged
    yield from report.notes
    if totals.maybe_paid:
        yield (
            f"{counted(totals.maybe_paid, 'request')} may have been paid for without giving images: "
            "see maybe_paid in the manifest."
        )


def _places(report: BatchReport, deliver: str | None) -> Iterator[str]:
    store = report.manifest_uri.rpartition(f"/{BATCHES}")[0]
    yield f"Images     {place(f'{store}/{IMAGES}'.rstrip('/'))}"
    if deliver and report.totals.delivered:
        copies = counted(report.totals.delivered, "file")
        yield f"Delivered  {place(store_at(deliver).uri('x').removesuffix('/x'))} ({copies})"
    yield f"Gallery    {place(report.gallery_uri) if report.gallery_uri else 'could not be written'}"
    yield f"Manifest   {place(report.manifest_uri)}"
    yield f"Run        {run_url(report.flow_run_id)}"
    if report.gallery_uri:
        yield f"To look at the images: prefect-ttapi open {shlex.quote(place(store))}"
