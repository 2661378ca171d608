"""Where pictures are made: in threads, so that the event loop goes on serving; and the files behind URLs."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import pybase64

from prefect_ttapi.sandbox.pictures import Picture, draw, padded

_FILES_KEPT: Final = 10_000

_Made = TypeVar("_Made")


class Studio:
    """Draws pictures, now or when their URL is asked for.

    URLs lead to a bounded table of what to draw, not to images: the oldest of 10,000 are forgotten.

    Args:
        image_bytes: length of each finished PNG, filled up with noise; None: as it comes.
    """

    def __init__(self, image_bytes: int | None = None) -> None:
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sandbox-studio")
        self._noise = random.Random(0).randbytes(image_bytes or 0)  # noqa: S311 - no secret
        self._files: OrderedDict[str, Picture] = OrderedDict()

    def close(self) -> None:
        """End the threads; what is being drawn is finished first."""
        self._threads.shutdown(cancel_futures=True)

    async def base64(self, picture: Picture) -> bytes:
        """The encoded picture in base64."""
        return await self._in_thread(lambda: pybase64.b64encode(self._made(picture)))

    def file_for(self, picture: Picture) -> str:
        """The name of a file that will be drawn when it is asked for."""
        name = f"{secrets.token_urlsafe(16)}.{picture.output_format}"
        self._files[name] = picture
        if len(self._files) > _FILES_KEPT:
            self._files.popitem(last=False)
        return name

    async def file(self, name: str) -> tuple[bytes, str] | None:
        """Content and media type of a file, or None where there is none of this name."""
        picture = self._files.get(name)
        if picture is None:
            return None
        return await self._in_thread(lambda: self._made(picture)), f"image/{picture.output_format}"

    def _made(self, picture: Picture) -> bytes:
        encoded = draw(picture)
        fills_up = picture.output_format == "png" and picture.blocks == 1
        return padded(encoded, self._noise) if fills_up else encoded

    async def _in_thread(self, make: Callable[[], _Made]) -> _Made:
        return await asyncio.get_running_loop().run_in_executor(self._threads, make)
