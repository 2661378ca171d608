"""The tables of the documentation's reference pages, made of the code, so that they are never out of date.

A page asks for one with a line of its own: `{{ models }}`. `tools.site` puts it there while the site is built.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr

from prefect_ttapi import ContentCredentialsSigner, ImageRequest, ImageStore, TTAPICredentials
from prefect_ttapi.capabilities import MODELS, NEEDS, RULES
from prefect_ttapi.cli.main import app
from prefect_ttapi.generation.budget import Budget, Price
from prefect_ttapi.generation.files import Provenance
from prefect_ttapi.images.renditions import Rendition
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.results import DeliveredImage, StoredImage, Usage

#: What credentials need on S3 besides s3:GetObject, s3:PutObject and s3:ListBucket, by the option that asks for it.
IAM_ACTIONS: Final[Mapping[str, str]] = {
    "tags": "s3:PutObjectTagging",
    "acl": "s3:PutObjectAcl",
    "encryption": "kms:GenerateDataKey, kms:Decrypt",
    "kms_key_id": "kms:GenerateDataKey, kms:Decrypt",
}


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def models() -> str:
    """Return what each field of a request may hold, a column for each model."""

    def legal(model: str, name: str) -> str:
        rule = RULES[model].get(name)
        return rule.legal if rule else "–"

    names = [name for name in ImageRequest.model_fields if any(name in RULES[model] for model in MODELS)]
    lines = [[f"`{name}`", *(legal(model, name) for model in MODELS)] for name in names]
    return table(["field", *(f"`{model}`" for model in MODELS)], lines)


def combinations() -> str:
    """Return which values are legal only beside others."""
    lines = [
        [
            f"`{name}` other than {_either(need.unless)}",
            f"`{need.other}` to be {_either(need.values)}",
        ]
        for name, need in NEEDS.items()
    ]
    return table(["a value of", "needs"], lines)


def _either(values: Iterable[object]) -> str:
    return " or ".join(f"`{value}`" for value in values)


def form(kind: type[BaseModel], within: str = "") -> str:
    """Return every option of a form with its type, default and meaning; of forms in it, too."""
    heads = ["option", "type", "default", "meaning", "IAM action"]
    lines = list(_options(kind, within))
    if not any(line[-1] for line in lines):
        heads, lines = heads[:-1], [line[:-1] for line in lines]
    return table(heads, lines)


def _options(kind: type[BaseModel], within: str) -> Iterable[list[str]]:
    told = attributes(kind)
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _options(inner, f"{within}{name}.")
            continue
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        meaning = " ".join((field.description or told.get(name, "")).split())
        yield [f"`{within}{name}`", _type(inner), default, meaning, IAM_ACTIONS.get(name, "")]


def _shown(default: object) -> str:
    """Return a default as code; a constructor's empty collection is none."""
    return "" if default is None or default == {} or default == () else f"`{default!r}`".replace("'", '"')


def _type(annotation: Any) -> str:
    """Return a type in words that people use."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return _either(arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(one) for one in arguments if one is not NoneType)
    if arguments and origin is tuple:
        return f"list of {_type(arguments[0])}"
    if arguments:
        return f"{origin.__name__.lower()} of {', '.join(_type(one) for one in arguments)}"
    named = {
        str: "text",
        float: "number",
        int: "whole number",
        bool: "true or false",
        SecretStr: "secret",
        Any: "any",
    }
    return named.get(annotation) or getattr(annotation, "__name__", str(annotation))


def attributes(kind: type) -> dict[str, str]:
    """Return what a class's docstring says of its attributes, by name."""
    found = re.search(r"^Attributes:\n((?: .*\n?|\n)+)", inspect.getdoc(kind) or "", re.MULTILINE)
    told: dict[str, str] = {}
    for names, words in re.findall(
        r"^    (\w[\w, ]*): (.*(?:\n {8,}.*)*)", found[1] if found else "", re.MULTILINE
    ):
        told |= dict.fromkeys(names.split(", "), " ".join(words.split()))
    return told


def fields(kind: type[BaseModel]) -> str:
    """Return what a record holds: names, types, and what its docstring says of them."""
    told = attributes(kind)
    lines = [
        [f"`{name}`", _type(field.annotation), told.get(name, field.description or "")]
        for name, field in kind.model_fields.items()
    ]
    return table(["field", "type", "meaning"], lines)


def commands() -> str:
    """Return what each command takes; the page has a title and a table of contents of its own."""
    told = app.generate_docs().replace(" -m zensical", "")  # how this very process was started
    return re.sub(r"\A# .*\n|^## Table of Contents\n\n(- .*\n)+", "", told, flags=re.MULTILINE)


#: What a page may ask for.
TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "commands": commands,
    "models": models,
    "combinations": combinations,
    "request": partial(form, ImageRequest),
    "store": partial(form, ImageStore),
    "credentials": partial(form, TTAPICredentials),
    "signer": partial(form, ContentCredentialsSigner),
    "budget": partial(form, Budget),
    "price": partial(form, Price),
    "rendition": partial(form, Rendition),
    "provenance": partial(form, Provenance),
    "row": partial(fields, Row),
    "stored-image": partial(fields, StoredImage),
    "delivered-image": partial(fields, DeliveredImage),
    "usage": partial(fields, Usage),
}
