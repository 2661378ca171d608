"""A picture as it grows: partial images of a stream, shown on the run while a slow model is at work."""

from __future__ import annotations

from functools import partial
from typing import Final

from prefect_ttapi.images.thumbnails import GALLERY_BOX, as_data_uri, thumbnail_or_none
from prefect_ttapi.lineage.artifacts import publish_markdown
from prefect_ttapi.lineage.text import CAPTION, inert, one_line
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.responses import PartialImage
from prefect_ttapi.rules import RULES

#: Previews asked for where the request doesn't say; the vendor makes no more.
PARTIAL_IMAGES: Final = 3


def with_previews(request: ImageRequest) -> ImageRequest:
    """The same request, read as a stream with previews; unchanged for models that can't stream.

    >>> with_previews(ImageRequest(prompt="a tree", model="gpt-image-1")).partial_images
    3
    """
    if "stream" not in RULES[request.model]:
        return request
    wanted = {"stream": True, "partial_images": request.partial_images or PARTIAL_IMAGES}
    return request.model_copy(update=wanted)


def publish_preview(request_hash: str, caption: str, preview: PartialImage) -> None:
    """Show `preview` in the run's artifact for this request; each is a new version of it."""
    publish_markdown(
        f"ttapi-preview-{request_hash}",
        preview_markdown(caption, preview),
        description=f"Request {request_hash[:12]} as it grows",
    )


def preview_markdown(caption: str, preview: PartialImage) -> str:
    """The artifact of one preview."""
    webp = thumbnail_or_none(partial(preview.spool.open), GALLERY_BOX)
    picture = f'<img width="{GALLERY_BOX}" src="{as_data_uri(webp)}">' if webp else "no picture"
    shown = f'<span dir="auto">{inert(one_line(caption, CAPTION))}</span>'
    return f"## Preview {preview.index + 1}\n\n<p>\n{picture}<br>\n{shown}\n</p>\n"
