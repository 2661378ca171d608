"""The program: `prefect-ttapi COMMAND`, or `python -m prefect_ttapi COMMAND`.

Each command is a module with `add_arguments(parser)` and `run(arguments) -> int`, the exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NoReturn

from prefect_ttapi.errors import StoreError, TTAPIError

#: Name, module, and what `--help` says of it.
COMMANDS: Final = (
    ("run", "prefect_ttapi.cli.run", "generate and deliver the images of a prompts file"),
    ("sandbox", "prefect_ttapi.sandbox.command", "serve a stand-in for the API: it draws placeholders"),
    ("verify", "prefect_ttapi.cli.verify", "read a whole store and say what is wrong with it"),
    ("trace", "prefect_ttapi.cli.trace", "tell who made an image, and what a run made"),
)


class _OneLine(argparse.ArgumentParser):
    """Complain in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 where the command failed, 2 on bad arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:  # where the version stands is more than the other commands need
        print(f"prefect-ttapi {import_module('prefect_ttapi.results').VERSION}")
        return 0
    parser = _OneLine(prog="prefect-ttapi", description="TTAPI images in Prefect: tools.")
    parser.add_argument("--version", action="store_true", help="show the package's version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module, summary in COMMANDS:
        command = commands.add_parser(name, help=summary, description=summary)
        if name in words[:1]:  # the other commands' modules need not be loaded
            found = import_module(module)
            found.add_arguments(command)
            command.set_defaults(run=found.run)
    try:
        arguments = parser.parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        print(f"prefect-ttapi {words[0]}: {error}", file=sys.stderr)
        return 2
    except (OSError, StoreError, TTAPIError) as error:
        print(f"prefect-ttapi {words[0]}: {error}", file=sys.stderr)
        return 1
