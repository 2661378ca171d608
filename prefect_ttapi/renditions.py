"""Renditions: smaller or lighter versions of an image, delivered beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: Format to media type, and the quality (1 to 100) that is used where none is given; PNG keeps every pixel.
_FORMATS: Final[Mapping[str, tuple[str, int | None]]] = {
    "webp": ("image/webp", 80),
    "jpeg": ("image/jpeg", 85),
    "png": ("image/png", None),
}

#: What `{rendition}` is for the image itself.
ORIGINAL: Final = "original"

#: WebP's limit, in pixels a side.
LARGEST_SIDE: Final = 16_383


class Rendition(BaseModel):
    """One version of each delivered image.

    Never enlarged; upright, whatever a camera's orientation tag says; in sRGB; without camera data and profiles.
    What is transparent becomes white in a JPEG.

    Attributes:
        format: `webp`, `jpeg` or `png`.
        max_size: longest side in pixels, at most 16,383; None: as large as the image.
        quality: 1 to 100, for `webp` (80) and `jpeg` (85).
        name: what `{rendition}` stands for in a key template; by default what is given of the above.

    >>> Rendition(max_size=1024).name, Rendition(format="jpeg", max_size=256, quality=70).name
    ('webp-1024', 'jpeg-256-q70')
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["webp", "jpeg", "png"] = "webp"
    max_size: int | None = Field(None, ge=1, le=LARGEST_SIDE)
    quality: int | None = Field(None, ge=1, le=100)
    name: str = Field("", max_length=60, pattern=r"^([a-z0-9]([a-z0-9_.-]*[a-z0-9])?)?$")

    @model_validator(mode="before")
    @classmethod
    def _with_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("name"):
            return given
        parts = (given.get("format", "webp"), given.get("max_size"), _quality_part(given.get("quality")))
        return {**given, "name": "-".join(str(part) for part in parts if part)}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.format == "png" and self.quality is not None:
            raise ValueError("a png has no quality: it keeps every pixel")
        if self.name == ORIGINAL:
            raise ValueError(f"a rendition can't be called {ORIGINAL!r}: that is the image itself")
        return self

    @property
    def media_type(self) -> str:
        """`image/webp`, `image/jpeg` or `image/png`."""
        return _FORMATS[self.format][0]

    @property
    def used_quality(self) -> int | None:
        """`quality`, or what is used instead; None for PNG."""
        return self.quality or _FORMATS[self.format][1]

    @property
    def recipe(self) -> str:
        """All that decides how it looks, whatever it is called.

        >>> Rendition(format="jpeg", max_size=256, name="thumbnail").recipe
        'jpeg-256-q85'
        """
        parts = (self.format, self.max_size, _quality_part(self.used_quality))
        return "-".join(str(part) for part in parts if part)

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Its size, of an image of this size, in pixels.

        >>> Rendition(max_size=1024).size_of(1536, 1024), Rendition(max_size=1024).size_of(640, 480)
        ((1024, 683), (640, 480))
        """
        longest = max(width, height)
        if self.max_size is None or longest <= self.max_size:
            return width, height
        scale = self.max_size / longest
        return max(1, round(width * scale)), max(1, round(height * scale))


def _quality_part(quality: int | None) -> str:
    return f"q{quality}" if quality else ""


#: What is delivered of an image: a rendition, or (None) a copy of itself.
Version = Rendition | None


def versions_of(
    renditions: Sequence[Rendition | Mapping[str, Any]], *, keep_original: bool = True
) -> tuple[Version, ...]:
    """What is delivered of each image, the image itself first; a mapping of its fields will do for a rendition.

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
