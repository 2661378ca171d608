"""Prefect tasks and blocks for TTAPI image generation: each image paid once, delivered to S3, traceable."""

from prefect_ttapi.batch import BatchReport, Budget, Price, agenerate_batch, generate_batch
from prefect_ttapi.caching import REQUEST_HASH
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import (
    APIConnectionError,
    AuthenticationError,
    BatchError,
    BudgetExceeded,
    DownloadError,
    IllegalBatchError,
    ImageMissingError,
    InsufficientBalanceError,
    InvalidRequestError,
    InvalidResponseError,
    ModerationError,
    PictureError,
    QueueFullError,
    RateLimitError,
    ServerError,
    StoreError,
    TTAPIError,
    UnknownOutcomeError,
)
from prefect_ttapi.images.renditions import Rendition
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import (
    CompletedImage,
    DeliveredImage,
    GeneratedImages,
    Generation,
    PartialImage,
    StoredImage,
    Usage,
)
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.tasks import adeliver_images, agenerate_images, deliver_images, generate_images
from prefect_ttapi.wire.client import TTAPIClient

__all__ = [
    "REQUEST_HASH",
    "APIConnectionError",
    "AuthenticationError",
    "BatchError",
    "BatchReport",
    "Budget",
    "BudgetExceeded",
    "CompletedImage",
    "DeliveredImage",
    "DownloadError",
    "GeneratedImages",
    "Generation",
    "IllegalBatchError",
    "ImageMissingError",
    "ImageRequest",
    "ImageStore",
    "InsufficientBalanceError",
    "InvalidRequestError",
    "InvalidResponseError",
    "ModerationError",
    "PartialImage",
    "PictureError",
    "Price",
    "QueueFullError",
    "RateLimitError",
    "Rendition",
    "ServerError",
    "StoreError",
    "StoredImage",
    "TTAPIClient",
    "TTAPICredentials",
    "TTAPIError",
    "UnknownOutcomeError",
    "Usage",
    "adeliver_images",
    "agenerate_batch",
    "agenerate_images",
    "deliver_images",
    "generate_batch",
    "generate_images",
]
