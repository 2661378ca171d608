"""What each model accepts: one table of rules; and forms that refuse what is not in them.

The rules are the vendor's (POST /v1/images/generations); that `stream` and `partial_images` are for GPT Image
models only is OpenAI's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, LiteralString, get_args

from pydantic import BaseModel, SecretStr, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

Model = Literal["gpt-image-2", "gpt-image-1.5", "gpt-image-1", "dall-e-3", "dall-e-2"]
MODELS: Final[tuple[str, ...]] = get_args(Model)


@dataclass(frozen=True)
class Rule:
    """What one field may hold for one model; `legal` says it to a person, `values` lists it where that can be."""

    legal: str
    allows: Callable[[Any], bool]
    values: Sequence[Any] = ()


def one_of(*values: Any) -> Rule:
    """Return the rule that allows these values."""
    return Rule(", ".join(map(str, values)), values.__contains__, values)


def between(low: int, high: int) -> Rule:
    """Return the rule that allows whole numbers from `low` to `high`."""
    numbers = range(low, high + 1)
    return Rule(f"{low}" if low == high else f"{low} to {high}", numbers.__contains__, numbers)


def characters(most: int) -> Rule:
    """Return the rule that allows at most so many characters, of which one is not blank."""
    return Rule(
        f"1 to {most:,} characters, not all of them blank",
        lambda text: len(text) <= most and bool(text.strip()),
    )


def _is_free_size(size: str) -> bool:
    sides = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size)
    if sides is None:
        return size == "auto"
    width, height = int(sides[1]), int(sides[2])
    return width % 16 == 0 and height % 16 == 0 and width <= 3 * height and height <= 3 * width


#: gpt-image-2's sizes. An upper bound is the server's to set: the vendor documents none.
FREE_SIZE: Final = Rule(
    "auto, or WIDTHxHEIGHT with both sides divisible by 16 and an aspect ratio from 1:3 to 3:1", _is_free_size
)
ANY_TEXT: Final = Rule("any text", lambda _: True)

_GPT_IMAGE: Final[dict[str, Rule]] = {
    "prompt": characters(32_000),
    "n": between(1, 10),
    "size": one_of("auto", "1024x1024", "1536x1024", "1024x1536"),
    "quality": one_of("auto", "low", "medium", "high"),
    "background": one_of("auto", "transparent", "opaque"),
    "moderation": one_of("auto", "low"),
    "output_format": one_of("png", "jpeg", "webp"),
    "output_compression": between(0, 100),
    "stream": one_of(False, True),
    "partial_images": between(0, 3),
    "user": ANY_TEXT,
}
_URL_OR_BASE64 = one_of("url", "b64_json")

#: What each model's fields may hold. A field that is not listed does not apply to the model: it may hold its
#: default, which is then neither sent nor hashed.
RULES: Final[Mapping[str, Mapping[str, Rule]]] = {
    "gpt-image-2": _GPT_IMAGE | {"size": FREE_SIZE},
    "gpt-image-1.5": _GPT_IMAGE,
    "gpt-image-1": _GPT_IMAGE,
    "dall-e-3": {
        "prompt": characters(4_000),
        "n": between(1, 1),
        "size": one_of("auto", "1024x1024", "1792x1024", "1024x1792"),
        "quality": one_of("auto", "standard", "hd"),
        "response_format": _URL_OR_BASE64,
        "style": one_of("vivid", "natural"),
        "user": ANY_TEXT,
    },
    "dall-e-2": {
        "prompt": characters(1_000),
        "n": between(1, 10),
        "size": one_of("auto", "256x256", "512x512", "1024x1024"),
        "quality": one_of("auto", "standard"),
        "response_format": _URL_OR_BASE64,
        "user": ANY_TEXT,
    },
}


def choices(field: str) -> dict[str, Any]:
    """Return the JSON schema of what some model allows, for a form that does not know the model yet.

    >>> choices("moderation"), choices("partial_images"), choices("user")
    ({'enum': ['auto', 'low']}, {'minimum': 0, 'maximum': 3}, {})
    """
    rules = [rules[field] for rules in RULES.values() if field in rules]
    values = list(dict.fromkeys(value for rule in rules for value in rule.values))
    if not values or isinstance(values[0], bool):
        return {}
    if isinstance(values[0], int):
        return {"minimum": min(values), "maximum": max(values)}
    return {"enum": values}


@dataclass(frozen=True)
class Needs:
    """A value other than `unless` is legal only while another field holds one of `values`."""

    unless: tuple[Any, ...]
    other: str
    values: tuple[Any, ...]

    def violated_by(self, value: Any, others: Mapping[str, Any]) -> str | None:
        """Return what is wrong with `value`, or None; `others` are the fields known to be legal by themselves."""
        if value in self.unless or self.other not in others or others[self.other] in self.values:
            return None
        return f"it needs {self.other} {' or '.join(map(str, self.values))}, not {others[self.other]}"


#: Rules between two fields; the other field is validated first.
NEEDS: Final[Mapping[str, Needs]] = {
    "background": Needs(("auto", "opaque"), "output_format", ("png", "webp")),
    "output_compression": Needs((100,), "output_format", ("jpeg", "webp")),
    "partial_images": Needs((0,), "stream", (True,)),
}


class Strict(BaseModel):
    """A form whose error names each unknown field, with the nearest known one, beside all other errors."""

    #: What is said of an unknown name, before the nearest one.
    _unknown: ClassVar[str] = "is no setting of {form}:"
    #: Names that are accepted besides the fields: others add them to what they keep of such a form.
    _added: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def knows(cls, name: object) -> bool:
        """Whether there is a field of this name, or others may add one."""
        return name in cls.model_fields or name in cls._added

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_fields(cls, data: Any, handler: Any) -> Any:
        unknown = [name for name in data if not cls.knows(name)] if isinstance(data, Mapping) else []
        if not unknown:
            return handler(data)
        # its value is not repeated: it may be a secret under a misspelt name
        told = cls._unknown.format(form=cls.__name__)
        found = [
            _details((str(name),), "unknown_field", f"{told} {nearest(name, cls.model_fields)}")
            for name in unknown
        ]
        try:
            handler({name: value for name, value in data.items() if cls.knows(name)})
        except ValidationError as error:
            others = error.errors(include_url=False)
            found += [_details(one["loc"], one["type"], one["msg"], one["input"]) for one in others]
        raise ValidationError.from_exception_data(cls.__name__, found)


def nearest(name: object, legal: Collection[str]) -> str:
    """Return which name was probably meant, or all there are.

    >>> nearest("apikey", ("api_key", "base_url")), nearest("x", ("api_key", "base_url"))
    ('did you mean api_key?', 'legal: api_key, base_url')
    """
    near = difflib.get_close_matches(str(name), legal, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "legal: " + ", ".join(legal)


def _details(loc: tuple[int | str, ...], kind: Any, message: str, given: Any = None) -> InitErrorDetails:
    """Return one of several errors, to be raised together."""
    return InitErrorDetails(type=problem(kind, message), loc=loc, input=given)


def problem(kind: LiteralString, message: str) -> PydanticCustomError:
    """Return an error for a validator to raise."""
    # pydantic's message is a template: ours goes in as one fact, so that braces in it stay text
    return PydanticCustomError(kind, "{message}", {"message": message})


def problems_of(error: ValidationError) -> list[str]:
    """Return a line per problem, without what was given: `size is '1x1' for dall-e-3; legal: ...`."""
    return [
        f"{'.'.join(map(str, detail['loc']))} {detail['msg'].removeprefix('Value error, ')}".strip()
        for detail in error.errors(include_url=False, include_input=False)
    ]


def is_masked(value: object) -> bool:
    """Return whether a text is nothing but asterisks, which stand where a secret was.

    >>> is_masked("**********"), is_masked(""), is_masked("*a")
    (True, False, False)
    """
    word = value.strip() if isinstance(value, str) else ""
    return bool(word) and not word.strip("*")


def unmasked(secret: SecretStr | None) -> SecretStr | None:
    """Return the secret.

    Raises:
        ValueError: it is nothing but asterisks, which stand where a secret was.
    """
    if secret and is_masked(secret.get_secret_value()):
        raise ValueError(
            "a key of nothing but asterisks is what Prefect's JSON makes of a secret, as in the parameters of "
            "Task.delay or of a deployment: save the block and pass its name or a reference to it, or set the "
            "key in the environment of whatever runs this"
        )
    return secret
