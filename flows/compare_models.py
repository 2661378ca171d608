"""Prompts x models x sizes, as one contact sheet: which model suits?

python -m flows.compare_models "a lighthouse at dawn" "a fox made of paper" --store ./out --sandbox
"""

from __future__ import annotations

import argparse
import sys

from prefect import flow

from flows.contact_sheet import CELL, contact_sheet
from prefect_ttapi import ImageRequest, ImageStore, generate_batch
from prefect_ttapi.batch import check_batch
from prefect_ttapi.capabilities import MODELS, RULES, Model
from prefect_ttapi.cli.running import add_store_options, credentials_from, exit_status, sandbox_if
from prefect_ttapi.cli.stores import store_at
from prefect_ttapi.generation.temporary_server import start_server
from prefect_ttapi.images.renditions import thumbnail
from prefect_ttapi.results import StoredImage


@flow(name="compare-models", persist_result=False)
def compare_models(
    prompts: list[str],
    store: str,
    models: list[Model],
    sizes: list[str],
    credentials: str | None = None,
    max_in_flight: int = 8,
) -> str:
    """Each prompt by each model in each size that the model has; the address of the contact sheet.

    Args:
        prompts: what to draw: one row of the sheet each.
        store: a folder, `s3://bucket/prefix` or `block:NAME`.
        models: the models to compare.
        sizes: sizes to compare; a model that lacks one leaves it out.
        credentials: name of a credentials block; else TTAPI_API_KEY is used.
        max_in_flight: requests under way at once.
    """
    columns = columns_of(models, sizes)
    requests = [ImageRequest(prompt=p, model=model, size=size) for p in prompts for model, size in columns]
    place = store_at(store)
    report = generate_batch(
        requests,
        credentials_from(credentials),
        place,
        max_in_flight=max_in_flight,
        name="compare-models",
        raise_on_failure=False,
    )
    cells = [_cell(row.images, row.error, place) for row in report.rows]
    grid = [cells[start : start + len(columns)] for start in range(0, len(cells), len(columns))]
    sheet = contact_sheet(prompts, [f"{model} {size}" for model, size in columns], grid)
    return place.write(f"batches/{report.flow_run_id}/contact-sheet.png", sheet, "image/png")


def columns_of(models: list[Model], sizes: list[str]) -> list[tuple[Model, str]]:
    """List the models with each of the sizes that they have."""
    columns: list[tuple[Model, str]] = [
        (model, size) for model in models for size in sizes if RULES[model]["size"].allows(size)
    ]
    if not columns:
        raise ValueError(f"none of {', '.join(models)} has a size of {', '.join(sizes)}")
    return columns


def _cell(images: tuple[StoredImage, ...], error: str | None, place: ImageStore) -> bytes | str:
    if not images:
        return error or "no image"
    with place.open(images[0].uri) as file:
        return thumbnail(file, box=CELL)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.compare_models", description=compare_models.__doc__
    )
    parser.add_argument("prompts", nargs="+", help="what to draw")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--sizes", nargs="+", default=["1024x1024"], metavar="SIZE")
    add_store_options(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    with sandbox_if(options.sandbox):
        # Prefect logs a traceback for what goes wrong inside a flow, so all that can be known is found before it
        columns = columns_of(options.models, options.sizes)
        check_batch(
            [{"prompt": p, "model": model, "size": size} for p in options.prompts for model, size in columns],
            credentials_from(options.credentials),
            store_at(options.store),
            max_in_flight=options.max_in_flight,
        )
        start_server()
        sheet = compare_models(
            options.prompts,
            options.store,
            options.models,
            options.sizes,
            credentials=options.credentials,
            max_in_flight=options.max_in_flight,
        )
    print(f"Contact sheet: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
