"""Say what may be shown of requests, images and rows: their prompts, or the requests' names in their place.

The ledger and the manifest keep the prompt: they lie in the user's own store, and tell where an image comes from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import StoredImage

NOT_RECORDED: Final = "prompt not recorded"


@dataclass(frozen=True)
class Shown:
    """What may be shown in artifacts, pages, logs, events, keys and the metadata of delivered objects.

    Attributes:
        prompts: whether prompts may, and what models made of them.

    >>> request = ImageRequest(prompt="a new car")
    >>> Shown().prompt(request), Shown(prompts=False).prompt(request)
    ('a new car', 'request b2de0737ccb6')
    """

    prompts: bool = True

    def prompt(self, request: ImageRequest) -> str:
        """Return the prompt, or the request's name, which a key template's `slug` is then made of, too."""
        return request.prompt if self.prompts else _name(request.request_hash)

    def withheld(self, request: ImageRequest) -> str:
        """Return the prompt if nothing may quote it, else an empty text."""
        return "" if self.prompts else request.prompt

    def image(self, image: StoredImage) -> StoredImage:
        """Return the image, without its revised prompt if need be."""
        return image if self.prompts else image.model_copy(update={"revised_prompt": None})

    def row(self, row: Row) -> Row:
        r"""Return the row, if need be without prompts, what was given of an illegal item, and quotes of the prompt.

        >>> row = Row(row=0, status="failed", given={"prompt": "a new car", "n": 0}, error="'a new car' is too long")
        >>> shown = Shown(prompts=False).row(row)
        >>> shown.prompt, shown.error
        ('prompt not recorded', "'prompt not recorded' is too long")
        >>> Shown(prompts=False).row(row.model_copy(update={"given": {"prompt": "a new\n car "}})).error
        "'prompt not recorded' is too long"
        """
        if self.prompts:
            return row
        named = {"prompt": _name(row.request_hash), **row.asked} if row.request_hash else None
        withheld = {
            "request": None,
            "given": named or (row.given and {"prompt": NOT_RECORDED, "model": row.model}),
            "images": tuple(map(self.image, row.images)),
            "error": row.error and _unquoted(row.error, row.prompt),
            "maybe_paid": tuple(_unquoted(note, row.prompt) for note in row.maybe_paid),
        }
        return row.model_copy(update=withheld)


#: Prompts may be shown.
EVERYTHING: Final = Shown()


def _name(request_hash: str) -> str:
    return f"request {request_hash[:12]}"


def _unquoted(text: str, prompt: str) -> str:
    # errors are one line, whatever the prompt was
    quote = r"\s+".join(map(re.escape, prompt.split()))
    return re.sub(rf"(?<!\w){quote}(?!\w)", NOT_RECORDED, text) if quote else text
