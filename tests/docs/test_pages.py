"""The documentation says what the code does: variables, events, messages and options are those of the code."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import prefect_ttapi
from prefect_ttapi.cli.main import app
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.publishing import image_facts
from prefect_ttapi.lineage.report import BatchReport, Totals
from prefect_ttapi.lineage.shown import Shown
from prefect_ttapi.storage.keys import NAMES
from prefect_ttapi.storage.settings import UploadOptions
from tests.support.generations import generation_of, request_of
from tests.support.rows import stored
from tools import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
PACKAGE = ROOT / "prefect_ttapi"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def named(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def commands_in(text: str) -> Iterator[str]:
    """What a page tells its readers to run, but where `...` stands for more."""
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from (line for line in block.splitlines() if line.startswith("prefect-ttapi "))
    yield from re.findall(r"`(prefect-ttapi [a-z]+ (?!\.\.\.)[^`\n]+)`", text)


@cache
def texts() -> tuple[str, ...]:
    """Every text in the package's code; what an f-string fills in is a tab."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\t" for part in node.values)
                found.append("".join(map(str, parts)))
    return tuple(found)


def in_navigation(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values():
                yield from in_navigation([inner] if isinstance(inner, str) else inner)


def test_every_page_is_in_the_navigation() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(in_navigation(project["nav"])) == pages


@pytest.mark.parametrize("name", reference.TABLES)
def test_tables_are_asked_for_and_whole(name: str) -> None:
    """Each table stands on a page, and says something of each of its lines."""
    assert any(f"\n{{{{ {name} }}}}\n" in path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    made = reference.TABLES[name]()
    lines = [re.split(r"(?<!\\) \|", line) for line in made.splitlines() if line.startswith("|")]
    assert len(lines) > 2 or name == "commands"
    if lines and "meaning" in made.splitlines()[0]:
        meaning = [cell.strip("| ") for cell in lines[0]].index("meaning")
        assert [line[0] for line in lines if not line[meaning].strip("| ")] == []


def test_commands_are_taken() -> None:
    """Each `prefect-ttapi COMMAND ARGUMENTS` of shell examples and prose is one that the program takes."""
    lines = [line for path in PAGES for line in commands_in(path.read_text(encoding="utf-8"))]
    assert len(lines) > 8
    for line in lines:
        # any command takes these
        words = [word for word in shlex.split(line)[1:] if word not in ("--quiet", "--verbose")]
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_actions_are_told_of_options_that_exist() -> None:
    assert reference.IAM_ACTIONS.keys() <= UploadOptions.model_fields.keys()
    policy = page("howto/object-stores.md")
    assert all(action in policy for told in reference.IAM_ACTIONS.values() for action in told.split(", "))


def test_the_environment_that_is_read_is_listed() -> None:
    """Variables that the package reads are in the first table, and no others are."""
    read = {text for text in texts() if re.fullmatch(r"(TTAPI|AWS|XDG)_[A-Z0-9_]+|TERM", text)}
    told = page("reference/environment.md").partition("## Read by what")[0]
    assert {name for name in named(told) if re.fullmatch(r"[A-Z][A-Z0-9_]+", name)} == read


def test_the_events_are_those_that_are_sent() -> None:
    """Names, labels and payloads of events."""
    told = named(page("reference/events.md"))
    sent = {text for text in texts() if re.fullmatch(r"ttapi\.\w+(\.\w+)?", text)}
    assert {name for name in told if re.fullmatch(r"ttapi\.\w+(\.\w+)?", name)} == sent
    image = stored(revised_prompt="a tall lighthouse")
    known = {"request_id": "r", "flow_run_id": "f", "task_run_id": "t"}
    generation = generation_of(request_of(), image).model_copy(update=known)
    facts = image.model_dump(include={"size_bytes", "media_type", "width", "height"})
    copy = prefect_ttapi.DeliveredImage(
        uri="file:///a.webp",
        url="https://example.com/a.webp",
        sha256=image.sha256,
        source_uri=image.uri,
        rendition="webp",
        recipe="webp",
        source_sha256=image.sha256,
        marks=("xmp",),
        **facts,
    )
    payload = page("reference/events.md").partition("The payload has")[2].partition("Prompts are cut")[0]
    assert image_facts(generation, copy, Shown(True)).keys() == named(payload)
    report = BatchReport(
        name="batch", flow_run_id="", totals=Totals(), manifest_uri="", gallery_uri="", seconds=0
    )
    assert report.facts.keys() <= told


def test_messages_are_those_of_the_code() -> None:
    """What troubleshooting explains is said somewhere; what differs from case to case stands as `...`."""
    lines = re.findall(r"^\| `([^`]+)` \|", page("troubleshooting.md"), re.MULTILINE)
    assert len(lines) > 30
    never_said = []
    for line in lines:
        parts = [part.strip() for part in line.split("...") if part.strip(" :;")]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        never_said += [] if any(map(pattern.search, texts())) else [line]
    assert never_said == []


def test_key_templates_take_what_is_listed() -> None:
    told = page("reference/options.md").partition("## Key templates")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)) == set(NAMES)


def test_every_public_error_is_explained() -> None:
    errors = {name for name in prefect_ttapi.__all__ if name.endswith(("Error", "Exceeded"))}
    assert errors <= named(page("errors.md"))


@pytest.mark.parametrize("kind", [Row, prefect_ttapi.StoredImage, prefect_ttapi.DeliveredImage])
def test_what_docstrings_say_of_fields_is_found(kind: type[BaseModel]) -> None:
    """Each field of a record is explained in its class's docstring, and nothing else is."""
    assert reference.attributes(kind).keys() == kind.model_fields.keys()


def test_files_that_are_named_are_there() -> None:
    """Paths in the prose of pages lead somewhere in a checkout."""
    paths = {
        path
        for text in PAGES
        for path in re.findall(
            r"`((?:docs|deployments|flows|benchmarks|tests|tools)/[\w./-]*)(?:::\w+)?`",
            text.read_text(encoding="utf-8"),
        )
    }
    assert {"tests/ledger/test_ledger_machine.py", "tests/test_secrets.py"} <= paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_map_has_every_module_in_its_room() -> None:
    """Each room of the map names its modules, and no others; a module of a command may go by the command's name."""
    rooms, modules = {}, {}
    for places, answer in re.findall(r"^\| (`.*?) \| (.*) \|$", page("map.md"), re.MULTILINE):
        for place in named(places):
            rooms[place] = named(answer)
    for path in PACKAGE.rglob("[a-z]*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        modules.setdefault(room if room.endswith(".py") else f"{room}/", set()).add(path.stem)
    assert rooms.keys() == modules.keys()
    missing = {room: modules[room] - rooms[room] for room in rooms if room.endswith("/")}
    commands = {name for name in app if not name.startswith("-")}
    assert missing.pop("cli/") <= commands
    assert not any(missing.values()), missing
    assert rooms["cli/"] <= modules["cli/"] | commands
    assert all(rooms[room] <= modules[room] for room in missing if room != "generation/")


def test_each_threat_has_its_tests() -> None:
    """Each line of the table of threats names tests; that they are there is tested above."""
    table = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("| threat |")[2]
    threats = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(threats) > 12
    assert [line for line in threats if "`tests/" not in line.split("|")[3]] == []
