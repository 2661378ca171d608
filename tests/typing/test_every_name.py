"""What type checkers read is what there is."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import prefect_ttapi
from prefect_ttapi import ImageStore, TTAPICredentials


def test_every_public_name_is_used() -> None:
    tree = ast.parse(Path(__file__).with_name("every_name.py").read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(prefect_ttapi.__all__) <= used


@pytest.mark.parametrize("form", [ImageStore, TTAPICredentials])
def test_constructors_take_each_field(form: type[ImageStore | TTAPICredentials]) -> None:
    """The signature that type checkers see has each field, and no other name."""
    (written, *_) = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(form)))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    names = [argument.arg for argument in (*written.args.args, *written.args.kwonlyargs)]
    assert set(names) == {"self", *form.model_fields}
