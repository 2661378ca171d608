"""Opening images without trusting them: the bytes are hostile until decoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO, Final, TypeVar

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from prefect_ttapi.errors import PictureError

R = TypeVar("R")

#: No image larger than this is decoded. The largest that the vendor's models make has a tenth of it.
MAX_PIXELS: Final = 80_000_000

#: Opened by class, since `PIL.Image.open` warns of large images before one can look at their size, and
#: warnings are neither thread-safe to catch nor harmless where they are errors.
_READERS: Final[dict[bytes, type[ImageFile]]] = {
    b"\x89PNG": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
}


def opened(file: BinaryIO) -> ImageFile:
    """The image in `file`, read from where it stands, with nothing decoded yet.

    Raises:
        PictureError: it is no PNG, JPEG or WebP, or unfolds to more than `MAX_PIXELS`. A damaged one makes Pillow
            raise whatever it stumbles over.
    """
    start = file.tell()
    head = file.read(4)
    file.seek(start)
    reader = next((reader for magic, reader in _READERS.items() if head.startswith(magic)), None)
    if reader is None:
        raise PictureError("the file is no PNG, JPEG or WebP")
    image = reader(file)
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(
            f"the image is {image.width} x {image.height} pixels; {MAX_PIXELS:,} are the limit"
        )
    return image


_new_workers: Final = partial(ThreadPoolExecutor, os.cpu_count() or 1, thread_name_prefix="ttapi-pixels")
_workers = _new_workers()


def at_work(call: Callable[[], R]) -> R:
    """What `call` gives or raises, run where this process decodes images: as many at once as it has processors.

    More would save no time, and any thread that once decoded an image keeps its memory.
    """
    return _workers.submit(call).result()


def _after_fork() -> None:
    """A child process has none of its parent's threads."""
    global _workers
    _workers = _new_workers()


os.register_at_fork(after_in_child=_after_fork)
