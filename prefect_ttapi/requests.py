"""What may be asked of the API, and the name under which an answer is remembered."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

import rfc8785
from pydantic import ConfigDict, Field, ValidationInfo, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError, ValidationError

from prefect_ttapi.capabilities import MODELS, NEEDS, RULES, Model, Rule, Strict, problem

#: What shapes the image, hence the fields of `request_hash`; `variant` is ours and applies to every model.
SHAPING: Final[tuple[str, ...]] = (
    "model", "prompt", "n", "size", "quality", "background", "moderation", "output_format",
    "output_compression", "style", "variant",
)  # fmt: skip

_VARIANT: Final = Rule("any text of at least one character", bool)

#: No character, hence nothing that can be sent; a pair of them would be one character in Python.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class ImageRequest(Strict):
    """One request for one or more images, legal for its model, with the vendor's field names.

    Every error of a request is in one `pydantic.ValidationError`, each naming field, model and legal values.
    `variant` is ours and never sent: the same request with another variant is another sample.

    >>> request = ImageRequest(prompt="a lighthouse", model="gpt-image-2", size="1536x1024")
    >>> request.body()
    {'model': 'gpt-image-2', 'prompt': 'a lighthouse', 'size': '1536x1024'}
    >>> request.request_hash[:12]
    '725f7723f7ec'
    """

    # our messages show what was wrong; pydantic's echo of the input would repeat whole prompts
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    _unknown: ClassVar[str] = "is no field of an image request;"

    model: Model = Field(default="dall-e-2", description="The model that makes the image")
    prompt: str = Field(description="What the image shows")
    n: int = Field(default=1, description="How many images")
    size: str = Field(default="auto", description="WIDTHxHEIGHT in pixels, or auto")
    quality: str = Field(default="auto", description="auto lets the model choose")
    output_format: str = Field(default="png", description="GPT Image models: png, jpeg or webp")
    background: str = Field(default="auto", description="GPT Image models: transparent needs png or webp")
    moderation: str = Field(default="auto", description="GPT Image models: low is less restrictive")
    output_compression: int = Field(default=100, description="GPT Image models: 0 to 100, with jpeg or webp")
    response_format: str | None = Field(default=None, description="DALL-E models: url or b64_json")
    stream: bool = Field(default=False, description="GPT Image models: read the answer as a stream")
    partial_images: int = Field(default=0, description="GPT Image models: 0 to 3 previews, with stream")
    style: str | None = Field(default=None, description="dall-e-3: vivid or natural")
    user: str | None = Field(
        default=None, description="Your end user, for the vendor's abuse detection; not hashed"
    )
    variant: str | None = Field(
        default=None, min_length=1, description="Another sample of the same request; not sent"
    )

    @field_validator("model", mode="before")
    @classmethod
    def _know_the_model(cls, value: Any) -> Any:
        if value not in MODELS:
            raise problem("unknown_model", f"is {_shown(value)}; legal: {', '.join(MODELS)}")
        return value

    @field_validator("n", "output_compression", "partial_images", mode="before")
    @classmethod
    def _refuse_what_only_python_counts_as_numbers(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise problem("not_a_number", "is no whole number")
        return value

    @field_validator("*", mode="wrap")
    @classmethod
    def _follow_the_table(
        cls, given: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        model, name = info.data.get("model"), str(info.field_name)
        if model is None:
            return handler(given)  # the model itself, or an illegal one, which is reported by itself
        rule = _VARIANT if name == "variant" else RULES[model].get(name)
        legal = f"legal: {rule.legal}" if rule else _only_for(name)
        try:
            value = handler(given)
        except ValidationError:
            raise _illegal(given, model, legal) from None
        if value is None or (rule is None and value == cls.model_fields[name].default):
            return value
        if isinstance(value, str) and _SURROGATE.search(value):
            raise _illegal(value, model, "it holds a lone surrogate, which is no character and can't be sent")
        if rule is None or not rule.allows(value):
            raise _illegal(value, model, legal)
        if name in NEEDS and (needed := NEEDS[name].violated_by(value, info.data)):
            raise _illegal(value, model, needed)
        return value

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:  # noqa: ARG002
        """Return a copy with other values, validated like any request."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate(given | dict(update or {}))

    @property
    def request_hash(self) -> str:
        """Hex SHA-256 over the RFC 8785 JSON of what shapes the image, defaults filled in.

        Fields that do not apply to the model and fields without a value are left out; `user`, `stream`,
        `partial_images` and `response_format` do not shape the image. Text is hashed as given: no Unicode
        normalisation.
        """
        applies = RULES[self.model].keys() | {"model", "variant"}
        shape = {name: getattr(self, name) for name in SHAPING if name in applies}
        present = {name: value for name, value in shape.items() if value is not None}
        return hashlib.sha256(rfc8785.dumps(present)).hexdigest()

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        """Return the JSON to send: model, prompt, and what differs from the vendor's defaults.

        Args:
            stream: ask for a stream of events, whatever the request says. `partial_images` is sent only then.
        """
        skipped = {"model", "prompt", "variant", "stream"} | (set() if stream else {"partial_images"})
        changed = {
            name: value
            for name, field in type(self).model_fields.items()
            if name not in skipped and (value := getattr(self, name)) != field.default
        }
        return {"model": self.model, "prompt": self.prompt} | changed | ({"stream": True} if stream else {})


def _shown(value: object) -> str:
    if isinstance(value, str) and len(value) > 60:
        return f"{len(value):,} characters long"
    text = ascii(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _illegal(value: Any, model: str, why: str) -> PydanticCustomError:
    return problem("illegal_for_model", f"is {_shown(value)} for {model}; {why}")


def _only_for(name: str) -> str:
    able = [model for model in MODELS if name in RULES[model]]
    return "it does not apply to this model, only to " + ", ".join(able)
