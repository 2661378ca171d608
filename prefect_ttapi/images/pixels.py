"""Decode images without trusting them: the bytes are hostile, and few are decoded at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, wraps
from typing import BinaryIO, Final, ParamSpec, TypeVar

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from prefect_ttapi.errors import PictureError, StoreError

P = ParamSpec("P")
R = TypeVar("R")

#: No image of more pixels is decoded. The largest that the vendor's models make has a tenth of it.
MAX_PIXELS: Final = 80_000_000

#: Opened by class, since `PIL.Image.open` warns of large images before one can look at their size, and
#: warnings are neither thread-safe to catch nor harmless where they are errors.
_READERS: Final[dict[bytes, type[ImageFile]]] = {
    b"\x89PNG": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
}

_new_workers: Final = partial(ThreadPoolExecutor, os.cpu_count() or 1, thread_name_prefix="ttapi-pixels")
_workers = _new_workers()


def in_worker(call: Callable[P, R]) -> Callable[P, R]:
    """Let a function run in one of as many threads as there are processors, and its caller wait for it.

    More would save no time, and any thread that once decoded an image keeps its memory. Must not be called from such
    a thread.
    """

    @wraps(call)
    def submitted(*args: P.args, **kwargs: P.kwargs) -> R:
        return _workers.submit(call, *args, **kwargs).result()

    return submitted


@contextmanager
def decoding(file: BinaryIO) -> Iterator[ImageFile]:
    """Give the image in `file`, of which nothing is decoded yet; what is made of it is made in the context.

    Args:
        file: a PNG, JPEG or WebP, read from where it stands; it is left open.

    Raises:
        PictureError: the bytes are no such image, are damaged, or unfold to more than `MAX_PIXELS`.
        OSError: the file can't be read.
    """
    try:
        yield _opened(file)
    except (PictureError, StoreError):
        raise
    except Exception as error:  # Pillow raises whatever a damaged file makes it stumble over
        if isinstance(error, OSError) and error.errno is not None:  # Pillow's have no number
            raise
        raise PictureError(f"the image can't be read: {type(error).__name__}: {error}") from error


def _opened(file: BinaryIO) -> ImageFile:
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


def _after_fork() -> None:
    """A child process has none of its parent's threads."""
    global _workers
    _workers = _new_workers()


os.register_at_fork(after_in_child=_after_fork)
