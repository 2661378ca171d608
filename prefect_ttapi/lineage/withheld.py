"""What may be shown where prompts are not recorded: the request's hash stands wherever its prompt would.

The ledger and the manifest keep the prompt: they lie in the user's own store, and tell where an image comes from.
"""

from __future__ import annotations

import re
from typing import Final

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import Generation, StoredImage

NOT_RECORDED: Final = "prompt not recorded"


def request_without_prompt(request: ImageRequest, request_hash: str | None = None) -> ImageRequest:
    """The request with its name for a prompt, which is what a key template's `slug` is then made of, too.

    >>> request_without_prompt(ImageRequest(prompt="a new car")).prompt
    'request b2de0737ccb6'
    """
    return request.model_copy(update={"prompt": f"request {(request_hash or request.request_hash)[:12]}"})


def shown(request: ImageRequest, record_prompts: bool) -> ImageRequest:
    """The request as it may be shown."""
    return request if record_prompts else request_without_prompt(request)


def generation_without_prompts(generation: Generation) -> Generation:
    """The generation without its prompt and revised prompts."""
    withheld = {
        "request": request_without_prompt(generation.request, generation.request_hash),
        "images": _images(generation.images),
    }
    return generation.model_copy(update=withheld)


def without_prompts(row: Row) -> Row:
    """The row without its prompt, revised prompts, what was given of an illegal item, and quotes of the prompt.

    >>> row = Row(row=0, status="failed", given={"prompt": "a new car", "n": 0}, error="'a new car' is too long")
    >>> without_prompts(row).prompt, without_prompts(row).error
    ('prompt not recorded', "'prompt not recorded' is too long")
    >>> without_prompts(row.model_copy(update={"given": {"prompt": "a new\\n car "}})).error
    "'prompt not recorded' is too long"
    """
    withheld = {
        "request": row.request and request_without_prompt(row.request, row.request_hash),
        "given": row.given and {"prompt": NOT_RECORDED, "model": row.model},
        "images": _images(row.images),
        "error": row.error and _unquoted(row.error, row.prompt),
        "maybe_paid": tuple(_unquoted(note, row.prompt) for note in row.maybe_paid),
    }
    return row.model_copy(update=withheld)


def _images(images: tuple[StoredImage, ...]) -> tuple[StoredImage, ...]:
    return tuple(image.model_copy(update={"revised_prompt": None}) for image in images)


def _unquoted(text: str, prompt: str) -> str:
    # errors are one line, whatever the prompt was
    quote = r"\s+".join(map(re.escape, prompt.split()))
    return re.sub(rf"(?<!\w){quote}(?!\w)", NOT_RECORDED, text) if quote else text
