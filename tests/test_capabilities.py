"""The vendor's table of what each model accepts, written out once more and held against `ImageRequest`."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefect_ttapi.capabilities import MODELS, RULES
from prefect_ttapi.requests import ImageRequest


@dataclass(frozen=True)
class May:
    """One cell of the table: values that are legal, values that are not, and what the error says is legal."""

    hold: list[Any]
    not_hold: list[Any]
    says: list[str]
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NotFor:
    """A dash in the table: the default is accepted, neither sent nor hashed; nothing else is accepted."""

    default: Any
    others: list[Any]


ANY_USER = May(["", "user-1", "Zoë 🙂", "x" * 5000, None], [5, "\ud800"], [])
ANY_VARIANT = May(["1", "é", None], ["", 2, "\udfff"], [])
OLD_FORMATS = May(["url", "b64_json", None], ["", "URL", "base64", "png", 1], ["url", "b64_json"])
GPT_QUALITY = May(
    ["auto", "low", "medium", "high"],
    ["standard", "hd", "High", "", " low", None],
    ["auto", "low", "medium", "high"],
)
GPT_SIZES = ["auto", "1024x1024", "1536x1024", "1024x1536"]
NO_SIZES = [
    "",
    "Auto",
    "1024",
    "1024x",
    "1024X1024",
    "1024 x 1024",
    "1024×1024",
    "1024x1024\n",
    " auto",
    None,
    1024,
]
N_TO_10 = May([1, 2, 10, "3", "10", 4.0], [0, 11, -1, 1.5, True, "two", "1_0", "", None, [1]], ["1 to 10"])
NO_FREE_SIZES = ["0x0", "0x16", "64x16", "16x64", "1000x1000", "1024x1000", "-16x16", "+16x16", "016x16"]
NO_FREE_SIZES += ["16x16x16", "1_6x16", "16.0x16", "１６x16", "x", "autox16", "9" * 5000 + "x16"]

GPT: dict[str, May | NotFor] = {
    "prompt": May(
        ["x", "x" * 32_000, "🙂" * 32_000, " a ", "a\nb\tc"],
        ["", " \n", "x" * 32_001, None, 7, "a\ud800"],
        ["32,000"],
    ),
    "n": N_TO_10,
    "size": May(GPT_SIZES, [*NO_SIZES, "256x256", "1792x1024", "16x16"], GPT_SIZES),
    "quality": GPT_QUALITY,
    "background": May(
        ["auto", "transparent", "opaque"], ["none", "", None], ["auto", "transparent", "opaque"]
    ),
    "moderation": May(["auto", "low"], ["high", "off", "", None], ["auto", "low"]),
    "output_format": May(["png", "jpeg", "webp"], ["jpg", "PNG", "gif", "", None], ["png", "jpeg", "webp"]),
    "output_compression": May(
        [0, 1, 99, 100, "50"], [-1, 101, 0.5, True, "", None], ["0 to 100"], {"output_format": "jpeg"}
    ),
    "stream": May([True, False, "true", "false"], ["perhaps", "", None, 2], ["True", "False"]),
    "partial_images": May([0, 1, 2, 3, "3"], [-1, 4, 0.5, True, "", None], ["0 to 3"], {"stream": True}),
    "response_format": NotFor(None, ["url", "b64_json", ""]),
    "style": NotFor(None, ["vivid", "natural", ""]),
    "user": ANY_USER,
    "variant": ANY_VARIANT,
}
GPT_ONLY: dict[str, May | NotFor] = {
    "background": NotFor("auto", ["transparent", "opaque", "", None]),
    "moderation": NotFor("auto", ["low", "", None]),
    "output_format": NotFor("png", ["jpeg", "webp", "", None]),
    "output_compression": NotFor(100, [0, 99, 101, None, ""]),
    "stream": NotFor(False, [True, "yes", None]),
    "partial_images": NotFor(0, [1, 3, None]),
}

#: "What may be asked", line by line. A value of None means "not given", for fields that have no default.
TABLE: dict[str, dict[str, May | NotFor]] = {
    "gpt-image-2": GPT
    | {
        "size": May(
            [*GPT_SIZES, "16x16", "48x16", "16x48", "2048x2048", "3840x2160", "4096x8192", "99984x99984"],
            [*NO_SIZES, *NO_FREE_SIZES],
            ["auto", "WIDTHxHEIGHT", "16", "1:3", "3:1"],
        )
    },
    "gpt-image-1.5": GPT,
    "gpt-image-1": GPT,
    "dall-e-3": GPT_ONLY
    | {
        "prompt": May(["x", "x" * 4_000, "é" * 4_000], ["", "\t", "x" * 4_001, None], ["4,000"]),
        "n": May([1, "1"], [0, 2, 10, True, None], ["1"]),
        "size": May(
            ["auto", "1024x1024", "1792x1024", "1024x1792"],
            [*NO_SIZES, "256x256", "512x512", "1536x1024", "1024x1536", "16x16"],
            ["auto", "1024x1024", "1792x1024", "1024x1792"],
        ),
        "quality": May(
            ["auto", "standard", "hd"], ["low", "medium", "high", "HD", ""], ["auto", "standard", "hd"]
        ),
        "response_format": OLD_FORMATS,
        "style": May(["vivid", "natural", None], ["", "Vivid", "auto", 1], ["vivid", "natural"]),
        "user": ANY_USER,
        "variant": ANY_VARIANT,
    },
    "dall-e-2": GPT_ONLY
    | {
        "prompt": May(["x", "x" * 1_000, "字" * 1_000], ["", "\u3000", "x" * 1_001, None], ["1,000"]),
        "n": N_TO_10,
        "size": May(
            ["auto", "256x256", "512x512", "1024x1024"],
            [*NO_SIZES, "1536x1024", "1024x1536", "1792x1024", "1024x1792", "16x16"],
            ["auto", "256x256", "512x512", "1024x1024"],
        ),
        "quality": May(["auto", "standard"], ["hd", "low", "medium", "high", ""], ["auto", "standard"]),
        "response_format": OLD_FORMATS,
        "style": NotFor(None, ["vivid", "natural", ""]),
        "user": ANY_USER,
        "variant": ANY_VARIANT,
    },
}
CELLS = [(model, name) for model, row in TABLE.items() for name in row]


def ask(model: str, **fields: Any) -> ImageRequest:
    return ImageRequest.model_validate({"model": model, "prompt": "x"} | fields)


def errors_of(model: str, **fields: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        ask(model, **fields)
    return {str(error["loc"][0]): error["msg"] for error in caught.value.errors()}


def test_the_table_here_is_whole() -> None:
    """Every model and every field of a request is in this file's table, so that no cell goes untested."""
    assert set(TABLE) == set(MODELS) == set(RULES)
    for row in TABLE.values():
        assert set(row) == set(ImageRequest.model_fields) - {"model"}


@pytest.mark.parametrize(("model", "name"), CELLS)
def test_each_cell_of_the_table(model: str, name: str) -> None:
    """A model's field holds what its cell allows and nothing else; errors name field, model, legal values."""
    cell = TABLE[model][name]
    if isinstance(cell, NotFor):
        plain = ask(model)
        written = ask(model, **{name: cell.default})
        assert written == plain
        assert written.request_hash == plain.request_hash
        assert name not in written.body(stream=True).keys() - {"stream"}
        for value in cell.others:
            if value is None and cell.default is None:
                continue
            message = errors_of(model, **{name: value})[name]
            assert model in message
            able = [other for other in TABLE if isinstance(TABLE[other][name], May)]
            assert all(other in message for other in able)
        return
    for value in cell.hold:
        assert ask(model, **{name: value}, **cell.beside) is not None, value
    for value in cell.not_hold:
        found = errors_of(model, **{name: value}, **cell.beside)
        assert list(found) == [name], value
        assert model in found[name]
        assert len(found[name]) < 600
        if value != "a\ud800":
            assert all(legal in found[name] for legal in cell.says), found[name]


@pytest.mark.parametrize("model", [*MODELS])
def test_every_default_may_be_written_out(model: str) -> None:
    """The vendor's example sends every field's default, those that don't apply too: always legal."""
    defaults = {"background": "auto", "moderation": "auto", "n": 1, "output_compression": 100}
    defaults |= {
        "output_format": "png",
        "partial_images": 0,
        "quality": "auto",
        "size": "auto",
        "stream": False,
    }
    written = ask(model, **defaults)
    assert written == ask(model)
    assert written.body() == {"model": model, "prompt": "x"}


def test_the_default_model_is_the_vendors() -> None:
    """Without a model, a request is for dall-e-2 and follows its rules."""
    assert ImageRequest(prompt="x").model == "dall-e-2"
    with pytest.raises(ValidationError, match="dall-e-2"):
        ImageRequest(prompt="x" * 1_001)


@pytest.mark.parametrize(
    "name", ["", "dall-e-4", "DALL-E-3", "gpt-image-2 ", None, 3, True, ["dall-e-2"], {}]
)
def test_an_unknown_model_is_told_the_known_ones(name: object) -> None:
    """Whatever stands for the model, the one error names all five and no other field is blamed."""
    with pytest.raises(ValidationError) as caught:
        ImageRequest.model_validate({"model": name, "prompt": "x", "size": "1x1", "n": 99})
    found = {str(error["loc"][0]): error["msg"] for error in caught.value.errors()}
    assert list(found) == ["model"]
    assert all(model in found["model"] for model in MODELS)


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([1, 2, 8, 16]))
def test_free_sizes_follow_the_formula(width: int, height: int, grid: int) -> None:
    """gpt-image-2 takes a size exactly when both sides divide by 16 and the aspect is from 1:3 to 3:1."""
    width, height = width * grid, height * grid
    legal = width % 16 == 0 and height % 16 == 0 and Fraction(1, 3) <= Fraction(width, height) <= 3
    if legal:
        assert ask("gpt-image-2", size=f"{width}x{height}").size == f"{width}x{height}"
    else:
        assert f"{width}x{height}" in errors_of("gpt-image-2", size=f"{width}x{height}")["size"]


@given(st.text(max_size=20))
def test_any_text_as_a_size_is_judged_not_crashed_on(text: str) -> None:
    """No text makes the size rules do anything but accept or refuse."""
    for model in MODELS:
        try:
            request = ask(model, size=text)
        except ValidationError as error:
            places = [details["loc"] for details in error.errors()]
        else:
            places = [("size",)] if request.size == text else []
        assert places == [("size",)]


GPT_MODELS = ("gpt-image-2", "gpt-image-1.5", "gpt-image-1")


@pytest.mark.parametrize("model", GPT_MODELS)
@pytest.mark.parametrize(
    ("name", "value", "needed", "legal", "illegal"),
    [
        ("background", "transparent", "output_format", ["png", "webp"], ["jpeg"]),
        ("output_compression", 50, "output_format", ["jpeg", "webp"], ["png"]),
        ("output_compression", 0, "output_format", ["jpeg", "webp"], ["png"]),
        ("partial_images", 1, "stream", [True], [False]),
    ],
)
def test_a_field_that_needs_another(
    model: str, name: str, value: Any, needed: str, legal: list[Any], illegal: list[Any]
) -> None:
    """Transparency, compression and previews ask for a value of another field, whichever is written first."""
    for other in legal:
        assert getattr(ask(model, **{name: value, needed: other}), name) == value
        assert getattr(ask(model, **{needed: other, name: value}), name) == value
    for other in illegal:
        message = errors_of(model, **{name: value, needed: other})[name]
        assert model in message
        assert needed in message
        assert all(str(choice) in message for choice in legal)


def test_a_field_is_not_blamed_for_another_ones_error() -> None:
    """Where output_format itself is illegal, what depends on it is not reported as well."""
    found = errors_of("gpt-image-1", output_format="gif", background="transparent", output_compression=5)
    assert list(found) == ["output_format"]
