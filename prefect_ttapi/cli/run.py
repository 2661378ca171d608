"""The subcommand `run`: a file of prompts in, images in a folder or on S3 out, each paid for once.

prefect-ttapi run prompts.csv --store ./out
prefect-ttapi run prompts.csv --store s3://bucket/images --deliver s3://shop/assets --key "{name}-{size}.{ext}"
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from prefect_ttapi.batch import (
    BatchReport,
    Budget,
    check_batch,
    estimate_batch,
    generate_batch,
    read_prompts,
)
from prefect_ttapi.capabilities import MODELS
from prefect_ttapi.cli.running import (
    add_store_options,
    credentials_from,
    exit_status,
    failures,
    place,
    run_url,
    sandbox_if,
)
from prefect_ttapi.cli.signals import start_server
from prefect_ttapi.cli.stores import store_at
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.layout import BATCHES, IMAGES

_NOT_DELIVERED = "a key is given, but no place to deliver to: say --deliver, or leave out --key"


@flow(name="campaign", flow_run_name="campaign-{name}", persist_result=False)
def campaign(
    prompts: str,
    store: str,
    name: str = "campaign",
    deliver: str | None = None,
    key: str | None = None,
    credentials: str | None = None,
    prompt_column: str | None = None,
    defaults: dict[str, Any] | None = None,
    limit: int | None = None,
    max_in_flight: int = 8,
    max_images: int | None = None,
    max_usd: float | None = None,
    prices: dict[str, Any] | None = None,
    rate_limit: float | None = None,
    columns: dict[str, str | None] | None = None,
    encoding: str | None = None,
    skip_blank: bool = False,
) -> State[BatchReport]:
    """Generate every prompt of a file into `store`, and deliver copies under keys that people know.

    Args:
        prompts: a file of prompts; its columns are request fields, any others can be used in `key`.
        store: a folder, `s3://bucket/prefix`, or `block:NAME` of an image store block.
        name: names the batch.
        deliver: where copies go; written like `store`.
        key: template of the delivered keys; by default `{slug}-{hash}-{index}.{ext}`.
        credentials: name of a credentials block; without it TTAPI_API_KEY and TTAPI_BASE_URL are used.
        prompt_column: the column that holds the prompts, where it isn't called `prompt`.
        defaults: request fields for rows without their own, e.g. `{"model": "gpt-image-2"}`.
        limit: only the first rows of the file.
        max_in_flight: requests under way at once.
        max_images: images to pay for at most; what is left over is skipped, and the next run goes on from there.
        max_usd: the same in money, by `prices`.
        prices: what a model costs, in USD: `{"gpt-image-2": {"per_image": 0.04}}`, or `per_million_input_tokens` and
            `per_million_output_tokens`.
        rate_limit: requests per minute at most.
        columns: the columns of a request's fields, e.g. `{"size": "image_size", "model": None}`; None: no column.
        encoding: of a text file that is not UTF-8.
        skip_blank: pass over rows without a prompt.
    """
    if key and not deliver:
        raise ValueError(_NOT_DELIVERED)
    given = read_prompts(
        prompts,
        prompt_column=prompt_column,
        columns=columns or {},
        defaults=defaults or {},
        limit=limit,
        encoding=encoding,
        skip_blank=skip_blank,
        key=key,
    )
    report = generate_batch(
        given.requests,
        credentials_from(credentials),
        store_at(store),
        deliver_to=store_at(deliver) if deliver else None,
        key=key or DEFAULT_KEY,
        values=given.values,
        max_in_flight=max_in_flight,
        budget=Budget(images=max_images, usd=max_usd, prices=prices),
        rate_limit=rate_limit,
        name=name,
        raise_on_failure=False,
    )
    # a Failed state and no exception: the report says what is wrong, a traceback would only hide it
    return (Completed if report.ok else Failed)(message=report.summary, data=report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    parser.epilog = "Exit status: 0 every row has its images; 1 some failed; 2 the input is wrong."
    add = parser.add_argument
    add(
        "prompts",
        help="CSV, TSV, text, JSON, Excel or Parquet; columns are request fields, others serve the key",
    )
    add_store_options(parser)
    add("--deliver", metavar="URL", help="where copies go, written like --store")
    add("--key", metavar="TEMPLATE", help=f"of delivered keys ({DEFAULT_KEY})")
    add("--prompt-column", metavar="NAME", help="the column with the prompts (prompt)")
    add(
        "--columns",
        action="append",
        type=_columns,
        metavar="FIELD=NAME,...",
        help="columns of a request's other fields; size=image_size,model= takes one, and leaves one to the key",
    )
    add("--encoding", help="of a text file that is not UTF-8, e.g. windows-1252")
    add("--skip-blank", action="store_true", help="pass over rows without a prompt")
    add("--model", help="for rows without one")
    add("--size", help="for rows without one")
    add("--limit", type=int, metavar="N", help="only the first N rows")
    add("--max-images", type=int, metavar="N", help="pay for at most N images")
    add("--max-usd", type=float, metavar="USD", help="pay USD at most, by --price")
    add(
        "--price",
        type=_price,
        action="append",
        metavar="MODEL=USD",
        help="of an image: gpt-image-2=0.04; of a million tokens in and out: gpt-image-2=5/40",
    )
    add("--rate-limit", type=float, metavar="N", help="at most N requests per minute")
    add("--name", default="campaign", help="of the batch (campaign)")
    add("--dry-run", action="store_true", help="check everything, count what is paid for, call nothing")


def _price(given: str) -> tuple[str, dict[str, str]]:
    """Return a model and its price, as `Budget` takes it.

    >>> _price("gpt-image-2=0.04"), _price("gpt-image-1=5/40")[1]["per_million_output_tokens"]
    (('gpt-image-2', {'per_image': '0.04'}), '40')
    """
    model, _, usd = given.partition("=")
    names = ("per_million_input_tokens", "per_million_output_tokens") if "/" in usd else ("per_image",)
    try:
        price = dict(zip(names, usd.split("/"), strict=True))
        Budget.model_validate({"prices": {model: price}})
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{given!r} is none: write gpt-image-2=0.04, or gpt-image-2=5/40; models: {', '.join(MODELS)}"
        ) from None
    return model, price


def _columns(text: str) -> dict[str, str | None]:
    """Return the columns by field that `size=image_size,model=` names."""
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+\s*=)", text)]  # names may have commas
    if not all(equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError("it is written like size=image_size,model=")
    return {field.strip(): name.strip() or None for field, _, name in pairs}


def run(arguments: argparse.Namespace) -> int:
    """Generate and deliver; return the exit status."""
    return exit_status(lambda: _run(arguments))


def _run(options: argparse.Namespace) -> int:
    with sandbox_if(options.sandbox):
        defaults = {name: value for name in ("model", "size") if (value := getattr(options, name))}
        prices: dict[str, Any] | None = dict(options.price or ()) or None
        if options.max_usd is not None and not prices:
            raise ValueError("--max-usd needs a price for each model, as --price gpt-image-2=0.04")
        columns = {field: name for part in options.columns or [] for field, name in part.items()}
        if options.key and not options.deliver:
            raise ValueError(_NOT_DELIVERED)
        given = read_prompts(
            options.prompts,
            prompt_column=options.prompt_column,
            columns=columns,
            defaults=defaults,
            limit=options.limit,
            encoding=options.encoding,
            skip_blank=options.skip_blank,
            key=options.key,
        )
        for note in given.notes:
            print(note)
        # Prefect logs a traceback for what goes wrong inside a flow, so all that can be known is found before it
        intake = check_batch(
            given.requests,
            credentials_from(options.credentials),
            store_at(options.store),
            deliver_to=store_at(options.deliver) if options.deliver else None,
            key=options.key or DEFAULT_KEY,
            values=given.values,
            max_in_flight=options.max_in_flight,
            budget=Budget(images=options.max_images, usd=options.max_usd, prices=prices),
            rate_limit=options.rate_limit,
            name=options.name,
        )
        if options.dry_run:
            print(
                estimate_batch(
                    intake, credentials_from(options.credentials), store_at(options.store), options.name
                )
            )
            return 0
        start_server()
        passed_on = ("name", "deliver", "key", "credentials", "prompt_column", "limit", "max_in_flight",
                     "max_images", "max_usd", "rate_limit", "encoding", "skip_blank")  # fmt: skip
        settings: dict[str, Any] = {name: getattr(options, name) for name in passed_on}
        settings |= {"defaults": defaults, "prices": prices, "columns": columns}
        state = campaign(options.prompts, options.store, **settings, return_state=True)
        return _tell(state.result(raise_on_failure=False))


def _tell(report: object) -> int:
    """Print what became of it and where things are; the exit status."""
    if not isinstance(report, BatchReport):
        print(f"error: the run ended without a report: {report}", file=sys.stderr)
        return 1
    totals = report.totals
    if totals.api_calls:
        paid = f"Paid for {totals.images - totals.images_cached} images in {totals.api_calls} calls."
    else:
        paid = "Nothing was paid for: every image was in the store already."
    if totals.generated or totals.cached:
        print(f"\n{report.summary}\n{paid}\n")
    for note in report.notes:
        print(note)
    if totals.maybe_paid:
        print(
            f"{totals.maybe_paid} may have been paid for without giving images: see maybe_paid in the manifest."
        )
    store = report.manifest_uri.rpartition(f"/{BATCHES}")[0]
    print(f"Images    {place(f'{store}/{IMAGES}'.rstrip('/'))}")
    print(f"Gallery   {place(report.gallery_uri) if report.gallery_uri else 'could not be written'}")
    print(f"Manifest  {place(report.manifest_uri)}")
    print(f"Run       {run_url(report.flow_run_id)}")
    for line in failures(report):
        print(line, file=sys.stderr)
    return 0 if report.ok else 1
