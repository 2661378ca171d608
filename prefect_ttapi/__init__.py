"""Prefect tasks and blocks for TTAPI image generation: each image paid once, delivered to S3, traceable."""

from importlib import import_module
from typing import TYPE_CHECKING

from prefect_ttapi import errors
from prefect_ttapi.errors import *  # noqa: F403

if TYPE_CHECKING:
    from prefect_ttapi.api.client import TTAPIClient
    from prefect_ttapi.batch import (
        BatchReport,
        Budget,
        Estimate,
        Price,
        Prompts,
        agenerate_batch,
        check_batch,
        estimate_batch,
        generate_batch,
        read_prompts,
    )
    from prefect_ttapi.credentials import ContentCredentialsSigner, TTAPICredentials
    from prefect_ttapi.generation.files import Provenance
    from prefect_ttapi.images.renditions import Rendition
    from prefect_ttapi.requests import ImageRequest
    from prefect_ttapi.results import (
        CompletedImage,
        DeliveredImage,
        GeneratedImages,
        Generation,
        PartialImage,
        StoredImage,
        Usage,
    )
    from prefect_ttapi.storage.settings import ConnectionOptions, UploadOptions
    from prefect_ttapi.storage.store import ImageStore
    from prefect_ttapi.tasks import (
        REQUEST_HASH,
        adeliver_images,
        agenerate_images,
        deliver_images,
        generate_images,
    )

__all__: list[str] = [
    "REQUEST_HASH",
    "BatchReport",
    "Budget",
    "CompletedImage",
    "ConnectionOptions",
    "ContentCredentialsSigner",
    "DeliveredImage",
    "Estimate",
    "GeneratedImages",
    "Generation",
    "ImageRequest",
    "ImageStore",
    "PartialImage",
    "Price",
    "Prompts",
    "Provenance",
    "Rendition",
    "StoredImage",
    "TTAPIClient",
    "TTAPICredentials",
    "UploadOptions",
    "Usage",
    "adeliver_images",
    "agenerate_batch",
    "agenerate_images",
    "check_batch",
    "deliver_images",
    "estimate_batch",
    "generate_batch",
    "generate_images",
    "read_prompts",
]
__all__ += errors.__all__

#: Where the names are, light modules first: Prefect and S3 are imported by whoever asks for what needs them.
_MODULES = (
    "prefect_ttapi.requests",
    "prefect_ttapi.results",
    "prefect_ttapi.api.client",
    "prefect_ttapi.images.renditions",
    "prefect_ttapi.storage.store",
    "prefect_ttapi.generation.files",
    "prefect_ttapi.credentials",
    "prefect_ttapi.tasks",
    "prefect_ttapi.batch",
)

if not TYPE_CHECKING:  # type checkers would take it for a sign that any name may be here

    def __getattr__(name: str) -> object:
        for module in map(import_module, _MODULES if name in __all__ else ()):
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
