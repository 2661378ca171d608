"""What the package says of itself: which packages it needs, and what its table of versions makes of it."""

from __future__ import annotations

import ast
import datetime
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from tools import versions

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

#: Not imported; a bound says which versions of what others bring don't work.
BOUNDS_ONLY = {"fastapi"}


def plain_name(requirement: str) -> str:
    """Return the normalised name of the package that `requirement` is about."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


def imported_names(source: str) -> Iterator[str]:
    """Yield the top-level name of each module that `source` imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    """Each package that a module imports is among the dependencies or extras; no dependency is left over."""
    imported = {
        name
        for path in (ROOT / "prefect_ttapi").rglob("*.py")
        for name in imported_names(path.read_text(encoding="utf-8"))
    } - {*sys.stdlib_module_names, "prefect_ttapi"}
    distributions = packages_distributions()
    needed = {plain_name(distributions[name][0]) for name in imported}
    required = {plain_name(requirement) for requirement in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    optional = {
        plain_name(requirement)
        for requirement in [*extras["parquet"], *extras["provenance"], *extras["xlsx"]]
    }
    assert needed - required == optional
    assert required - needed == BOUNDS_ONLY


def test_every_bound_has_a_floor() -> None:
    """Each dependency says from which version on it was tried, but for bounds that only keep versions out."""
    assert [line for line in PROJECT["dependencies"] if ">=" not in line] == ["fastapi<0.151"]


def test_the_pythons_that_are_claimed_are_rows_of_the_table() -> None:
    """Classifiers, `requires-python` and docs/versions.md tell of the same Pythons."""
    rows = versions.rows_of(versions.TABLE.read_text(encoding="utf-8"))
    tried = {row.python for row in rows}
    claimed = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert claimed == tried
    assert PROJECT["requires-python"] == ">=" + min(tried, key=lambda version: int(version.partition(".")[2]))


def test_the_table_is_read_and_written() -> None:
    """A row says Python and what is installed besides; what came of it goes to its last cell and to no other."""
    text = "| `a` | 3.11 | | before |\n| `b-3.12` | 3.12 | `--resolution lowest-direct` `x<2` | before |\n"
    first, second = versions.rows_of(text)
    assert (first.name, first.python, first.installed, first.is_lowest) == ("a", "3.11", (), False)
    assert (second.installed, second.is_lowest) == (("--resolution", "lowest-direct", "x<2"), True)
    found = [versions.Result(second, "passed", "Prefect 1")]
    written = versions.with_results(text, found, datetime.date(2030, 1, 2))
    assert written == text.replace("x<2` | before", "x<2` | passed on 2030-01-02: Prefect 1")


def test_what_the_rows_run_is_there() -> None:
    """The tests that rows run exist under these names."""
    assert all(
        (ROOT / path).exists() for path in (*versions.TESTS, *versions.QUICK_TESTS, versions.SCHEDULE_TEST)
    )
