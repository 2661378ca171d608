"""What may be asked of the API, and the name under which an answer is remembered."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Final, Self

import rfc8785
from pydantic import ConfigDict, Field, ValidationInfo, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticCustomError, ValidationError

from prefect_ttapi.capabilities import MODELS, NEEDS, RULES, Model, Rule, Strict, choices, problem

#: What shapes the image, hence the fields of `request_hash`; `variant` is ours and applies to every model.
SHAPING: Final = {
    "model", "prompt", "n", "size", "quality", "background", "moderation", "output_format",
    "output_compression", "style", "variant",
}  # fmt: skip

#: In a form, the sizes that no list can hold.
_ANOTHER_SIZE: Final = {"type": "string", "title": "Another size", "pattern": "^[1-9][0-9]*x[1-9][0-9]*$"}

_VARIANT: Final = Rule("any text of at least one character", bool)

#: No character, hence nothing that can be sent; a pair of them would be one character in Python.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def _as_form(schema: dict[str, Any]) -> None:
    """Add to a request's JSON schema what can be chosen, as the form of a flow that takes a request shows it."""
    schema["title"] = "Image request"
    schema["description"] = "This asks for one or more images of one prompt."
    for name, field in schema["properties"].items():
        allowed = choices(name)
        if name == "size":
            field.pop("type")
            field["anyOf"] = [{"type": "string", "title": "Usual size"} | allowed, dict(_ANOTHER_SIZE)]
        elif "anyOf" in field:
            # the name of its tab, beside None
            field["anyOf"][0] |= {"title": field["title"]} | allowed
        else:
            field |= allowed


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
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra=_as_form
    )

    _unknown: ClassVar[str] = "is no field of an image request;"

    model: Model = Field(default="dall-e-2", description="This model makes the images.")
    prompt: str = Field(description="The images show this.")
    n: int = Field(default=1, title="Number of images", description="One request makes so many images.")
    size: str = Field(
        default="auto",
        description="Images have this width and height in pixels. With auto, the model chooses. gpt-image-2 takes "
        "other sizes too, if both sides are divisible by 16.",
    )
    quality: str = Field(
        default="auto", description="With auto, the model chooses. Not every model has all of these."
    )
    output_format: str = Field(default="png", description="GPT Image models make files of this type.")
    background: str = Field(
        default="auto", description="GPT Image models make it transparent only in png and webp files."
    )
    moderation: str = Field(default="auto", description="With low, GPT Image models refuse fewer prompts.")
    output_compression: int = Field(
        default=100, description="GPT Image models compress jpeg and webp files to this quality."
    )
    response_format: str | None = Field(
        default=None,
        description="DALL-E models send an address of each image, or the image itself.",
    )
    stream: bool = Field(default=False, description="GPT Image models send their answer as a stream.")
    partial_images: int = Field(
        default=0, description="GPT Image models send so many previews, if they send a stream."
    )
    style: str | None = Field(default=None, description="Only dall-e-3 has styles.")
    user: str | None = Field(
        default=None,
        description="This names your end user, for the vendor's abuse detection. It is not hashed.",
    )
    variant: str | None = Field(
        default=None,
        min_length=1,
        description="The same request with another variant is another sample. It is not sent.",
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
        return type(self).model_validate(self.model_dump(exclude_unset=True) | dict(update or {}))

    @property
    def request_hash(self) -> str:
        """Hex SHA-256 over the RFC 8785 JSON of what shapes the image, defaults filled in.

        Fields that do not apply to the model and fields without a value are left out; `user`, `stream`,
        `partial_images` and `response_format` do not shape the image. Text is hashed as given: no Unicode
        normalisation.
        """
        applies = RULES[self.model].keys() | {"model", "variant"}
        shape = self.model_dump(include=SHAPING & applies, exclude_none=True)
        return _hash_of(tuple(shape.items()))

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        """Return the JSON to send: model, prompt, and what differs from the vendor's defaults.

        Args:
            stream: ask for a stream of events, whatever the request says. `partial_images` is sent only then.
        """
        skipped = {"model", "prompt", "variant", "stream"} | (set() if stream else {"partial_images"})
        changed = self.model_dump(exclude=skipped, exclude_defaults=True)
        return {"model": self.model, "prompt": self.prompt} | changed | ({"stream": True} if stream else {})


@lru_cache(maxsize=256)  # a batch asks a dozen times for each of the requests under way
def _hash_of(shape: tuple[tuple[str, Any], ...]) -> str:
    return hashlib.sha256(rfc8785.dumps(dict(shape))).hexdigest()


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
