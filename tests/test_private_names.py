"""Names of other packages that these don't document: each with what would replace it, and a test that misses it first.

A package may drop such a name in any version. Whoever adds one adds a row; who finds a documented one takes it off.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpcore
import prefect.context
import prefect.task_engine
import prefect.task_runners
import prefect.tasks
import pytest
import uvicorn
from pydantic import BaseModel, PrivateAttr

import prefect_ttapi

PACKAGE = Path(prefect_ttapi.__file__).parent
SOURCES = {
    path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
}


@dataclass(frozen=True)
class Undocumented:
    """A name, how it is spelt here (a pattern), what would replace it, and whether it is what we take it for."""

    name: str
    spelt: str
    instead: str
    stands: Callable[[], object]


def fields_of(context: type[BaseModel]) -> set[str]:
    return set(context.model_fields)


def is_said_of_parents() -> bool:
    """Both ways of making a task run tell its callers by this name."""
    return all('"__parents__"' in inspect.getsource(made) for made in (prefect.task_engine, prefect.tasks))


def is_in_the_state_of_a_model() -> bool:
    class Model(BaseModel):
        name: str = "x"
        _more: int = PrivateAttr(1)

    state = Model().__getstate__()
    return (state["__dict__"], state["__pydantic_private__"]) == ({"name": "x"}, {"_more": 1})


class Broken(httpcore.MockStream):
    """A connection that takes so many pieces, and then no more."""

    def __init__(self, taken: int) -> None:
        super().__init__([])
        self._left = taken

    def write(self, *_: object, **__: object) -> None:
        self._left -= 1
        if self._left < 0:
            raise httpcore.WriteTimeout


class BrokenNetwork(httpcore.MockBackend):
    """A network of broken connections."""

    def __init__(self, taken: int) -> None:
        super().__init__([])
        self._taken = taken

    def connect_tcp(self, *_: object, **__: object) -> httpcore.NetworkStream:
        return Broken(self._taken)


def traced(network: httpcore.NetworkBackend) -> set[str]:
    """The events of a POST, without their protocol."""
    events: set[str] = set()
    more = {"trace": lambda event, _: events.add(event.partition(".")[2])}
    with httpcore.ConnectionPool(network_backend=network) as pool:
        try:
            pool.request("POST", "http://ttapi.test/", content=b"x", extensions=more)
        except httpcore.WriteTimeout:
            events.add("WriteTimeout")
    return events


def tells_what_was_written() -> bool:
    """A request that arrives, one whose headers don't, and one whose body doesn't."""
    answer = httpcore.MockBackend([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
    whole, headless, bodiless = traced(answer), traced(BrokenNetwork(0)), traced(BrokenNetwork(1))
    return (
        "send_request_headers.started" in whole
        and not any(event.endswith("failed") for event in whole)
        and {"send_request_headers.failed", "WriteTimeout"} <= headless
        and {"send_request_body.failed", "WriteTimeout"} <= bodiless
    )


NAMES = [
    Undocumented(
        "prefect.context.AssetContext",
        r"\bAssetContext\b",
        "a public way to say, inside a task, what it materialises",
        lambda: (
            {"downstream_assets", "materialized_by"} <= fields_of(prefect.context.AssetContext)
            and callable(prefect.context.AssetContext.add_asset_metadata)
            and callable(prefect.context.AssetContext.update_tracked_assets)
        ),
    ),
    Undocumented(
        "prefect.context.FlowRunContext.task_run_assets",
        r"\.task_run_assets\b",
        "a public list of the assets that a flow run has tracked",
        lambda: "task_run_assets" in fields_of(prefect.context.FlowRunContext),
    ),
    Undocumented(
        "prefect.context.FlowRunContext.task_runner",
        r"\.task_runner\b",
        "a public name for the task runner of the flow that is running",
        lambda: "task_runner" in fields_of(prefect.context.FlowRunContext),
    ),
    Undocumented(
        'TaskRun.task_inputs["__parents__"]',
        r"\"__parents__\"",
        "TaskRun.parent_task_run_id, as flow runs have it",
        is_said_of_parents,
    ),
    Undocumented(
        'BaseModel.__getstate__()["__pydantic_private__"]',
        r"\"__pydantic_private__\"",
        "an option of PrivateAttr that keeps it out of pickles",
        is_in_the_state_of_a_model,
    ),
    Undocumented(
        "names of events in httpcore's trace",
        r"\"send_request_headers\.started\"",
        "an exception's attribute that says whether the request was written",
        tells_what_was_written,
    ),
    Undocumented(
        "uvicorn.Server.should_exit",
        r"\.should_exit\b",
        "a method of uvicorn.Server that stops it from another thread",
        lambda: uvicorn.Server(uvicorn.Config("app")).should_exit is False,
    ),
    Undocumented(
        "uvicorn.Server.server_state.connections",
        r"\.server_state\.connections\b",
        "an option of uvicorn.Server that loses its connections as it ends",
        lambda: uvicorn.Server(uvicorn.Config("app")).server_state.connections == set(),
    ),
]

#: Names with an underscore that their package documents.
DOCUMENTED = {"os._exit"}


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row.name)
def test_what_is_not_documented_is_still_there(row: Undocumented) -> None:
    """A version that drops the name, or means another thing by it, is found out here, and not by a lost image."""
    try:
        stands = row.stands()
    except (ImportError, AttributeError, LookupError, TypeError, OSError) as error:
        stands = pytest.fail(f"{row.name} is gone ({error}): use {row.instead}")
    assert stands, f"{row.name} is another thing: use {row.instead}"


@pytest.mark.parametrize("row", NAMES, ids=lambda row: row.name)
def test_what_is_listed_is_used(row: Undocumented) -> None:
    """A name that nothing uses any more leaves the list."""
    assert any(re.search(row.spelt, source) for source in SOURCES.values()), (
        "it is used no more: take it off the list"
    )


def test_no_other_private_name_is_used() -> None:
    """Each underscore that belongs to another package is in the list: attributes, imports and keyword arguments."""
    trees = {path: ast.parse(source) for path, source in SOURCES.items()}
    ours = {path: set(defined(tree)) for path, tree in trees.items()}
    found = {
        f"{path}: {name}"
        for path, tree in trees.items()
        for name in private_names(tree, ours[path], set().union(*ours.values()))
        if name not in DOCUMENTED and not any(re.search(row.spelt, f" {name}") for row in NAMES)
    }
    assert found == set()


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module gives a value to."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                yield name


def private_names(tree: ast.Module, mine: set[str], ours: set[str]) -> Iterator[str]:
    """Private names of others: not defined in this module; of `self`, whose class may inherit, in none of ours."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, value=value) if is_private(name):
                if name not in (ours if ast.unparse(value) in ("self", "cls", "super()") else mine):
                    yield ast.unparse(node)
            case ast.ImportFrom(module=module, names=names) if not (module or "").startswith("prefect_ttapi"):
                parts = [*(module or "").split("."), *(alias.name for alias in names)]
                yield from (f"{module} {part}" for part in parts if is_private(part))
            case ast.keyword(arg=str(name)) if is_private(name) and name not in ours:
                yield f"{name}="


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
