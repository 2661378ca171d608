"""Smaller or lighter versions of an image: renditions, delivered beside it, and thumbnails for artifacts.

Images are decoded without trusting them: the bytes are hostile, and few are decoded at a time.
"""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, BinaryIO, Final, Literal, ParamSpec, Self, TypeVar

from PIL import ImageCms, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Image, Resampling, new
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pydantic import ConfigDict, Field, model_validator

from prefect_ttapi.capabilities import Strict
from prefect_ttapi.errors import PictureError, StoreError
from prefect_ttapi.images.headers import media_type_of
from prefect_ttapi.images.spool import Body, Spool

P = ParamSpec("P")
R = TypeVar("R")

#: Whether a file gets a mark that says that a model made the picture; `prompt`: it tells the prompt, too.
Marking = bool | Literal["prompt"]

log: Final = logging.getLogger(__name__)

#: No image of more pixels is decoded. The largest that the vendor's models make has a tenth of it.
MAX_PIXELS: Final = 80_000_000

#: Opened by class, since `PIL.Image.open` warns of large images before one can look at their size, and
#: warnings are neither thread-safe to catch nor harmless where they are errors.
_READERS: Final[dict[str, type[ImageFile]]] = {
    "image/png": PngImageFile,
    "image/jpeg": JpegImageFile,
    "image/webp": WebPImageFile,
    "image/gif": GifImageFile,
    "image/bmp": BmpImageFile,
}
with suppress(ImportError):  # comes with Pillow 11.3
    from PIL.AvifImagePlugin import AvifImageFile

    _READERS["image/avif"] = AvifImageFile

#: How each format is written; `quality` (1 to 100) is used where none is given, and PNG keeps every pixel.
_FORMATS: Final[Mapping[str, dict[str, Any]]] = {
    "webp": {"quality": 80, "method": 4},
    "jpeg": {"quality": 85, "optimize": True, "progressive": True},
    "png": {},
}

#: What `{rendition}` is for the image itself.
ORIGINAL: Final = "original"

#: WebP's limit, in pixels a side.
LARGEST_SIDE: Final = 16_383

#: Side of the square, in pixels, that a thumbnail fits into.
ARTIFACT_BOX: Final = 180
GALLERY_BOX: Final = 256

#: Bytes of a colour profile that is believed in. Those of displays have 500 to 4,000, of presses some 500,000.
_LONGEST_PROFILE: Final = 1024 * 1024

#: Where a profile has its date, which would make each one another.
_DATE: Final = slice(24, 36)

_new_workers: Final = partial(ThreadPoolExecutor, os.cpu_count() or 1, thread_name_prefix="ttapi-pixels")
_workers = _new_workers()


def in_worker(call: Callable[P, R]) -> Callable[P, R]:
    """Make a function run in one of as many threads as there are processors, while its caller waits.

    More threads would save no time, and any thread that once decoded an image keeps its memory. The function must not
    be called from such a thread.
    """

    @wraps(call)
    def submitted(*args: P.args, **kwargs: P.kwargs) -> R:
        return _workers.submit(call, *args, **kwargs).result()

    return submitted


@contextmanager
def decoding(file: BinaryIO) -> Iterator[ImageFile]:
    """Yield the image in `file`, which is decoded where it is used, within the context.

    Args:
        file: an image, read from where it stands; it is left open.

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
    media_type = media_type_of(file.read(12))
    file.seek(start)
    reader = _READERS.get(media_type or "")
    if reader is None:
        raise PictureError(
            f"the file is no image that can be decoded here ({media_type or 'of no known kind'})"
        )
    image = reader(file)
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(
            f"the image is {image.width} x {image.height} pixels; {MAX_PIXELS:,} are the limit"
        )
    return image


def _after_fork() -> None:
    """Make new threads: a child process has none of its parent's."""
    global _workers
    _workers = _new_workers()


os.register_at_fork(after_in_child=_after_fork)


class Rendition(Strict):
    """One version of each delivered image.

    Never enlarged; upright, whatever a camera's orientation tag says; in sRGB, with a profile that says so where the
    image has one; without camera data. What is transparent becomes white in a JPEG.

    Attributes:
        format: `webp`, `jpeg` or `png`.
        max_size: longest side in pixels, at most 16,383; None: as large as the image.
        quality: 1 to 100, for `webp` (80) and `jpeg` (85).
        name: what `{rendition}` stands for in a key template; by default what is given of the above.
        mark: add an XMP packet that says that a model made the image, which one, in answer to which request, and what
            the SHA-256 of the stored image is, to the image's own packet; `"prompt"` adds the prompt, too.

    >>> Rendition(max_size=1024).name, Rendition(format="jpeg", max_size=256, quality=70).name
    ('webp-1024', 'jpeg-256-q70')
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["webp", "jpeg", "png"] = "webp"
    max_size: int | None = Field(default=None, ge=1, le=LARGEST_SIDE)
    quality: int | None = Field(default=None, ge=1, le=100)
    name: str = Field(default="", max_length=60, pattern=r"^([a-z0-9]([a-z0-9_.-]*[a-z0-9])?)?$")
    mark: Marking = True

    @model_validator(mode="before")
    @classmethod
    def _with_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("name"):
            return given
        name = _recipe(given.get("format", "webp"), given.get("max_size"), given.get("quality"))
        return {**given, "name": name}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.format == "png" and self.quality is not None:
            raise ValueError("a png has no quality: it keeps every pixel")
        if self.name == ORIGINAL:
            raise ValueError(f"a rendition can't be called {ORIGINAL!r}: that is the image itself")
        return self

    @property
    def media_type(self) -> str:
        """Return `image/webp`, `image/jpeg` or `image/png`."""
        return f"image/{self.format}"

    @property
    def used_quality(self) -> int | None:
        """Return `quality`, or the default of the format; None for PNG."""
        return self.quality or _FORMATS[self.format].get("quality")

    @property
    def recipe(self) -> str:
        """Return a name made of everything that decides how the rendition looks.

        >>> Rendition(format="jpeg", max_size=256, name="thumbnail").recipe
        'jpeg-256-q85'
        """
        return _recipe(self.format, self.max_size, self.used_quality)

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the size in pixels that an image of this size gets.

        >>> Rendition(max_size=1024).size_of(1536, 1024), Rendition(max_size=1024).size_of(640, 480)
        ((1024, 683), (640, 480))
        """
        longest = max(width, height)
        if self.max_size is None or longest <= self.max_size:
            return width, height
        scale = self.max_size / longest
        return max(1, round(width * scale)), max(1, round(height * scale))


def _recipe(form: str, max_size: int | None, quality: int | None) -> str:
    parts = (form, max_size, quality and f"q{quality}")
    return "-".join(str(part) for part in parts if part)


#: What is delivered of an image: a rendition, or (None) a copy of itself.
Version = Rendition | None


def versions_of(
    renditions: Sequence[Rendition | Mapping[str, Any]], *, keep_original: bool = True
) -> tuple[Version, ...]:
    """Return the versions to deliver of each image, the image itself first.

    A rendition may be given as a mapping of its fields.

    >>> [version and version.name for version in versions_of([{"max_size": 256}])]
    [None, 'webp-256']

    Raises:
        ValueError: one is illegal, two have one name, or there is nothing to deliver.
    """
    made = tuple(Rendition.model_validate(one) for one in renditions)
    names = [rendition.name for rendition in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two renditions are called {twice!r}: give one of them another name")
    if not made and not keep_original:
        raise ValueError("nothing would be delivered: keep_original is off, and there are no renditions")
    return (None, *made) if keep_original else made


@dataclass(frozen=True)
class Rendered:
    """A rendition's bytes, in a temporary file, and its size in pixels."""

    spool: Spool
    width: int
    height: int


@in_worker
def render(opener: Body, renditions: Iterable[Rendition]) -> list[Rendered]:
    """Return each of the renditions of the image that `opener` opens, in order.

    The same image gives the same bytes, unless another version of Pillow makes them.

    Raises:
        PictureError: the image can't be decoded, unfolds to too many pixels, or is too large for the format.
    """
    with opener() as file, decoding(file) as image:
        upright = _upright(image)
        return [_rendered(upright, rendition) for rendition in renditions]


def _upright(image: Image) -> Image:
    """Return the decoded image: upright, in sRGB, RGB or RGBA, and without anything but pixels."""
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits of grey
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    elif image.has_transparency_data or image.mode not in ("L", "CMYK", "RGB"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    converted = _in_srgb(image, profile)
    upright = (converted or image) if image.mode in ("RGB", "RGBA") else (converted or image).convert("RGB")
    upright.info = {"icc_profile": _srgb()} if converted else {}
    return upright


def _in_srgb(image: Image, profile: bytes | None) -> Image | None:
    """Return `image` with the colours that a browser shows; None where no profile can be used, as there."""
    if not profile or len(profile) > _LONGEST_PROFILE:
        return None
    try:
        return ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            outputMode="RGBA" if image.mode == "RGBA" else "RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        log.debug("a colour profile is of no use: %s", error)
        return None


@cache
def _srgb() -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[_DATE] = bytes(12)
    return bytes(profile)


def _rendered(image: Image, rendition: Rendition) -> Rendered:
    size = rendition.size_of(image.width, image.height)
    if max(size) > LARGEST_SIDE:
        raise PictureError(
            f"the rendition would be {size[0]} x {size[1]} pixels; {LARGEST_SIDE:,} a side are the limit: give max_size"
        )
    small = image if size == image.size else image.resize(size, Resampling.LANCZOS, reducing_gap=3.0)
    if rendition.format == "jpeg" and small.mode == "RGBA":
        page = new("RGB", size, "white")
        page.paste(small, mask=small)
        small = page
    encoded = io.BytesIO()
    options = {"quality": rendition.used_quality, "icc_profile": image.info.get("icc_profile", b"")}
    small.save(encoded, rendition.format, **_FORMATS[rendition.format] | options)
    return Rendered(Spool.of([encoded.getbuffer()]), *size)


@in_worker
def thumbnail(file: BinaryIO, box: int = ARTIFACT_BOX) -> bytes:
    """Return a WebP of the image in `file` that fits into `box` x `box` pixels; transparency is kept.

    Args:
        file: an image, read from where it stands; it is left open.
        box: side in pixels; a smaller image keeps its size.

    Raises:
        PictureError: the bytes are no such image, are damaged, or unfold to more than `MAX_PIXELS`.
        OSError: the file can't be read.
    """
    with decoding(file) as image:
        return _webp(_small(image, box), box)


def thumbnail_or_none(opener: Body, box: int = ARTIFACT_BOX) -> bytes | None:
    """Return the thumbnail of what `opener` opens; None, and a warning in the log, where there can be none."""
    try:
        with opener() as file:
            return thumbnail(file, box)
    except (PictureError, StoreError, OSError) as error:
        log.warning("no thumbnail: %s", error)
        return None


def as_data_uri(webp: bytes) -> str:
    """Return a `data:` address that holds the picture itself.

    >>> as_data_uri(b"RIFF")
    'data:image/webp;base64,UklGRg=='
    """
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def _small(image: ImageFile, box: int) -> Image:
    image.draft("RGB", (box, box))  # a JPEG is decoded at a fraction of its size, at least this large
    mode = "RGBA" if image.has_transparency_data else "RGB"
    small = image if image.mode == mode else image.convert(mode)
    # whole multiples are averaged away first: a fifth of the time, and no difference that one could see
    small.thumbnail((box, box), Resampling.LANCZOS, reducing_gap=1.0)
    return small


def _webp(image: Image, box: int) -> bytes:
    # the quickest method: two thirds of the time for a third more bytes; 3 KB must not carry 10 KB of profile
    options = {"method": 0, "icc_profile": b"", "exif": b""}
    for quality in (70, 40, 10):
        out = io.BytesIO()
        image.save(out, "WEBP", quality=quality, alpha_quality=quality, **options)
        if out.tell() <= box * box // 3:  # 5 KB at 128 pixels, 21 KB at 256: only noise needs more
            break
    return out.getvalue()
