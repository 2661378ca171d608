"""What each model accepts: one table, and the kinds of rule it is made of.

The rules are the vendor's (POST /v1/images/generations); that `stream` and `partial_images` are for GPT Image
models only is OpenAI's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, get_args

Model = Literal["gpt-image-2", "gpt-image-1.5", "gpt-image-1", "dall-e-3", "dall-e-2"]
MODELS: Final[tuple[str, ...]] = get_args(Model)


class Rule(Protocol):
    """What one field may hold for one model; `legal` says it to a person."""

    @property
    def legal(self) -> str: ...

    def allows(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class OneOf:
    values: tuple[Any, ...]

    @property
    def legal(self) -> str:
        return ", ".join(map(str, self.values))

    def allows(self, value: Any) -> bool:
        return value in self.values


@dataclass(frozen=True)
class Between:
    low: int
    high: int

    @property
    def legal(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"

    def allows(self, value: Any) -> bool:
        return self.low <= int(value) <= self.high


@dataclass(frozen=True)
class Characters:
    most: int

    @property
    def legal(self) -> str:
        return f"1 to {self.most:,} characters, not all of them blank"

    def allows(self, value: Any) -> bool:
        return len(value) <= self.most and bool(value.strip())


@dataclass(frozen=True)
class AnyText:
    legal: str = "any text"

    def allows(self, value: Any) -> bool:  # noqa: ARG002 - a Rule like the others
        return True


@dataclass(frozen=True)
class FreeSize:
    """gpt-image-2's sizes. An upper bound is the server's to set: the vendor documents none."""

    legal: str = "auto, or WIDTHxHEIGHT with both sides divisible by 16 and an aspect ratio from 1:3 to 3:1"

    def allows(self, value: Any) -> bool:
        if value == "auto":
            return True
        sides = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", value)
        if sides is None:
            return False
        width, height = int(sides[1]), int(sides[2])
        return width % 16 == 0 and height % 16 == 0 and width <= 3 * height and height <= 3 * width


_GPT_IMAGE: Final[dict[str, Rule]] = {
    "prompt": Characters(32_000),
    "n": Between(1, 10),
    "size": OneOf(("auto", "1024x1024", "1536x1024", "1024x1536")),
    "quality": OneOf(("auto", "low", "medium", "high")),
    "background": OneOf(("auto", "transparent", "opaque")),
    "moderation": OneOf(("auto", "low")),
    "output_format": OneOf(("png", "jpeg", "webp")),
    "output_compression": Between(0, 100),
    "stream": OneOf((False, True)),
    "partial_images": Between(0, 3),
    "user": AnyText(),
}
_URL_OR_BASE64 = OneOf(("url", "b64_json"))

#: What each model's fields may hold. A field that is not listed does not apply to the model: it may hold its
#: default, which is then neither sent nor hashed.
RULES: Final[Mapping[str, Mapping[str, Rule]]] = {
    "gpt-image-2": _GPT_IMAGE | {"size": FreeSize()},
    "gpt-image-1.5": _GPT_IMAGE,
    "gpt-image-1": _GPT_IMAGE,
    "dall-e-3": {
        "prompt": Characters(4_000),
        "n": Between(1, 1),
        "size": OneOf(("auto", "1024x1024", "1792x1024", "1024x1792")),
        "quality": OneOf(("auto", "standard", "hd")),
        "response_format": _URL_OR_BASE64,
        "style": OneOf(("vivid", "natural")),
        "user": AnyText(),
    },
    "dall-e-2": {
        "prompt": Characters(1_000),
        "n": Between(1, 10),
        "size": OneOf(("auto", "256x256", "512x512", "1024x1024")),
        "quality": OneOf(("auto", "standard")),
        "response_format": _URL_OR_BASE64,
        "user": AnyText(),
    },
}


@dataclass(frozen=True)
class Needs:
    """A value other than `unless` is legal only while another field holds one of `values`."""

    unless: tuple[Any, ...]
    other: str
    values: tuple[Any, ...]

    def violated_by(self, value: Any, others: Mapping[str, Any]) -> str | None:
        """What is wrong with `value`, or None; `others` are the fields known to be legal by themselves."""
        if value in self.unless or self.other not in others or others[self.other] in self.values:
            return None
        return f"it needs {self.other} {' or '.join(map(str, self.values))}, not {others[self.other]}"


#: Rules between two fields; the other field is validated first.
NEEDS: Final[Mapping[str, Needs]] = {
    "background": Needs(("auto", "opaque"), "output_format", ("png", "webp")),
    "output_compression": Needs((100,), "output_format", ("jpeg", "webp")),
    "partial_images": Needs((0,), "stream", (True,)),
}
