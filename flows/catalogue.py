"""An existing extract-transform flow in which images are two more lines; the key is in TTAPI_API_KEY.

python -m flows.catalogue flows/products.csv
"""

import sys

from prefect import flow, task

from prefect_ttapi import (
    DeliveredImage,
    ImageRequest,
    ImageStore,
    TTAPICredentials,
    check_batch,
    deliver_images,
    generate_images,
    read_prompts,
)

KEY = "{sku}.{ext}"
Product = dict[str, str | None]


@task
def describe(title: str, product: Product) -> ImageRequest:
    """Say what a product's picture shows."""
    prompt = f"Studio photograph of {title}, {product['material']}, plain background, soft light"
    return ImageRequest(prompt=prompt, model="gpt-image-2", size="1024x1024", quality="medium")


@task
def publish(product: Product, images: list[DeliveredImage]) -> Product:
    """Make the product as the shop wants it, with its picture."""
    return product | {"image": images[0].url or images[0].uri}


@flow(persist_result=False)
def catalogue(products: str, store: str = "./images", shop: str = "./shop") -> list[Product]:
    """Give each product of a file with the columns sku, title and material its picture, where the shop reads it."""
    credentials, images, to = TTAPICredentials.from_env(), ImageStore(url=store), ImageStore(url=shop)
    file = read_prompts(products, prompt_column="title")
    # a product without a number, or two of one number, are known before anything is paid for
    check_batch(file.requests, credentials, images, deliver_to=to, key=KEY, values=file.values)
    requests = describe.map([row.prompt for row in file.requests], file.values)
    generations = generate_images.map(requests, credentials, images)
    delivered = deliver_images.map(generations, to, key=KEY, values=file.values)
    return publish.map(file.values, delivered).result()


if __name__ == "__main__":
    print(*catalogue(sys.argv[1]), sep="\n")
