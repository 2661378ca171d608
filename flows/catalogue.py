"""An existing extract-transform flow in which images are two more lines.

python -m flows.catalogue flows/products.csv --store ./out --shop ./out/shop --sandbox
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from prefect import flow, task, unmapped

from prefect_ttapi import DeliveredImage, ImageRequest, deliver_images, generate_images
from prefect_ttapi.batch import check_batch
from prefect_ttapi.cli.running import add_store_options, credentials_from, exit_status, sandbox_if
from prefect_ttapi.cli.stores import store_at
from prefect_ttapi.generation.temporary_server import start_server

COLUMNS = {"sku", "title", "material"}
KEY = "{sku}.{ext}"


@task
def extract(products: str) -> list[dict[str, str]]:
    """Read the products as they come from elsewhere."""
    with Path(products).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, restkey="more", restval=""))
    if not rows or not rows[0].keys() >= COLUMNS:
        raise ValueError(
            f"{products} needs a row for each product, with the columns {', '.join(sorted(COLUMNS))}"
        )
    return rows


@task
def describe(product: dict[str, str]) -> ImageRequest:
    """Say what a product's picture shows."""
    prompt = f"Studio photograph of {product['title']}, {product['material']}, plain background, soft light"
    return ImageRequest(prompt=prompt, model="gpt-image-2", size="1024x1024", quality="medium")


@task
def publish(product: dict[str, str], images: list[DeliveredImage]) -> dict[str, str]:
    """Make the product as the shop wants it, with its picture."""
    return product | {"image": images[0].url or images[0].uri}


@flow(persist_result=False)
def catalogue(products: str, store: str, shop: str, credentials: str | None = None) -> list[dict[str, str]]:
    """Products in, products with pictures out.

    Args:
        products: CSV file with the columns sku, title and material.
        store: where images are kept: a folder, `s3://bucket/prefix` or `block:NAME`.
        shop: where the shop reads them, written like `store`.
        credentials: name of a credentials block; else TTAPI_API_KEY is used.
    """
    rows = extract(products)
    requests = describe.map(rows)
    generations = generate_images.map(
        requests, credentials=unmapped(credentials_from(credentials)), store=unmapped(store_at(store))
    )
    delivered = deliver_images.map(generations, to=unmapped(store_at(shop)), key=unmapped(KEY), values=rows)
    return publish.map(rows, delivered).result()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.catalogue", description=catalogue.__doc__)
    parser.add_argument("products", help="CSV with the columns sku, title, material")
    parser.add_argument("--shop", required=True, help="where the shop reads its pictures")
    add_store_options(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    with sandbox_if(options.sandbox):
        # Prefect logs a traceback for what goes wrong inside a flow, so all that can be known is found before it
        products = extract.fn(options.products)
        check_batch(
            [describe.fn(product) for product in products],
            credentials_from(options.credentials),
            store_at(options.store),
            deliver_to=store_at(options.shop),
            key=KEY,
            values=products,
        )
        start_server()
        for product in catalogue(options.products, options.store, options.shop, options.credentials):
            print(product["sku"], product["image"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
