"""Each public name as a script uses it. Type checkers read it, and find nothing (`make types`)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from prefect import flow, task, unmapped

from prefect_ttapi import (
    REQUEST_HASH,
    APIConnectionError,
    AuthenticationError,
    BatchError,
    BatchReport,
    Budget,
    BudgetExceeded,
    CompletedImage,
    ConnectionOptions,
    ContentCredentialsSigner,
    DeliveredImage,
    DownloadError,
    Estimate,
    GeneratedImages,
    Generation,
    IllegalBatchError,
    ImageMissingError,
    ImageRequest,
    ImageStore,
    InsufficientBalanceError,
    InvalidRequestError,
    InvalidResponseError,
    KeyTakenError,
    KeyTemplateError,
    ModelNotPermittedError,
    ModerationError,
    PartialImage,
    PictureError,
    Price,
    Prompts,
    PromptsError,
    Provenance,
    QueueFullError,
    RateLimitError,
    Rendition,
    ServerError,
    SigningError,
    StoredImage,
    StoreError,
    TTAPIClient,
    TTAPICredentials,
    TTAPIError,
    UnknownOutcomeError,
    UploadOptions,
    Usage,
    adeliver_images,
    agenerate_batch,
    agenerate_images,
    check_batch,
    deliver_images,
    estimate_batch,
    generate_batch,
    generate_images,
    read_prompts,
)

KEY = TTAPICredentials(api_key="key")
PATIENT = TTAPICredentials(api_key=KEY.api_key, read_timeout=900, on_dead_claim="unknown", max_attempts=2)
FOLDER = ImageStore(url=Path("~/images"), patience=30)
BUCKET = ImageStore(
    url="s3://acme-images/campaigns",
    endpoint_url="https://minio.example.com",
    access_key_id="id",
    secret_access_key="secret",
    upload={"tags": {"team": "art"}, "acl": "private"},
    connection=ConnectionOptions(addressing_style="path"),
)
SHOP = ImageStore(url="s3://acme-shop", upload=UploadOptions(content_disposition="inline"))
REQUEST = ImageRequest(prompt="a lighthouse", model="gpt-image-2", size="1536x1024", n=2)
SMALL = Rendition(max_size=1024, format="webp")


def signer(folder: Path) -> ContentCredentialsSigner:
    """What signs, from files."""
    return ContentCredentialsSigner(certificates=folder / "chain.pem", private_key_file=folder / "key.pem")


@task(cache_policy=REQUEST_HASH)
def hash_of(request: ImageRequest) -> str:
    """What a task of one's own may be cached by."""
    return request.request_hash


@flow
def one() -> list[DeliveredImage]:
    """One request, delivered, with its lower-level parts."""
    generation: Generation = generate_images(REQUEST, KEY, FOLDER, preview=True)
    stored: StoredImage = generation.images[0]
    usage: Usage | None = generation.usage
    print(hash_of(REQUEST), stored.uri, stored.width, usage.total_tokens if usage else 0)
    delivered = deliver_images(generation, SHOP, key="{slug}.{ext}", values={"sku": "12"}, renditions=[SMALL])
    return [image for image in delivered if image.url]


@flow
def many(products: list[dict[str, str]]) -> list[list[DeliveredImage]]:
    """As an existing flow takes pictures in."""
    requests = [{"prompt": product["title"], "model": "gpt-image-2"} for product in products]
    generations = generate_images.map(requests, credentials=unmapped(KEY), store=unmapped(FOLDER))
    return deliver_images.map(generations, to=unmapped(SHOP), values=products).result()


@flow
async def side_by_side() -> BatchReport:
    """The async twins."""
    generation = await agenerate_images(REQUEST, KEY, store=FOLDER)
    await adeliver_images(generation, to=SHOP, keep_original=False, renditions=[{"max_size": 256}])
    return await agenerate_batch([REQUEST], KEY, FOLDER, cache_expiration=timedelta(days=30))


def nightly(file: Path) -> str:
    """A batch with a budget, and what can be known of it before and afterwards."""
    prompts: Prompts = read_prompts(str(file))
    intake = check_batch(prompts.requests, KEY, FOLDER, values=prompts.values)
    estimate: Estimate = estimate_batch(intake, KEY, FOLDER)
    print(estimate.to_send, estimate.usd({"gpt-image-2": Price(per_image=0.04)}))
    budget = Budget(images=100, usd=3.00, prices={"gpt-image-2": Price(per_image=0.04)})
    try:
        report = generate_batch(prompts.requests, KEY, FOLDER, SHOP, values=prompts.values, budget=budget)
        marked = Provenance(mark="prompt")
        report = generate_batch(["a red car"], PATIENT, BUCKET, SHOP, renditions=[SMALL], provenance=marked)
    except BatchError as error:
        report = error.report
    except BudgetExceeded as error:
        return str(error)
    except (IllegalBatchError, PromptsError) as error:
        return "; ".join(error.problems) if isinstance(error, IllegalBatchError) else str(error)
    for row in report.rows:
        print(row.status, row.prompt, row.model, row.error, row.delivered[0].uri if row.delivered else "")
    print(report.totals.usd, report.left_over, report.ok)
    return str(report)


def by_hand() -> GeneratedImages | None:
    """The client without Prefect, and what can go wrong."""
    try:
        with TTAPIClient(KEY.api_key, KEY.base_url) as client:
            for image in client.stream(REQUEST):
                match image:
                    case PartialImage():
                        print(image.index)
                    case CompletedImage():
                        Path("lighthouse.png").write_bytes(image.read_bytes())
            return client.generate(REQUEST)
    except (ModerationError, ModelNotPermittedError, InvalidRequestError) as error:
        print(error.message)
    except (AuthenticationError, InsufficientBalanceError) as error:
        print(error.status_code)
    except (RateLimitError, QueueFullError, ServerError, APIConnectionError) as error:
        print(error.request_id)
    except (UnknownOutcomeError, InvalidResponseError, DownloadError) as error:
        print(error.outcome)
    except TTAPIError as error:
        print(error.attempts)
    except (ImageMissingError, KeyTakenError, StoreError, PictureError, SigningError) as error:
        print(error)
    except KeyTemplateError as error:
        print(error)
    return None
