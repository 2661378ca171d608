"""Run demo, tests and schedule in an environment for each row of the table in docs/versions.md.

    python tools/versions.py [--quick] [--write] [--python PATH]... [ROW]...

Each row has an environment, made anew, and a log in out/versions. Interpreters are looked for at `--python`, on PATH
and in pyenv. Exit status: 0 where every row passed, 1 where one failed, 2 where none failed but one was not run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

ROOT: Final = Path(__file__).resolve().parent.parent
TABLE: Final = ROOT / "docs" / "versions.md"
WORK: Final = ROOT / "out" / "versions"

#: A line of the table: name, Python, what uv is told besides, and what came of it.
_LINE: Final = re.compile(r"^\| `([\w.-]+)` \| (3\.\d+) \|([^|]*)\|([^|]*)\|$", re.MULTILINE)

#: What the table says of an environment.
_TOLD: Final = ("prefect", "sqlalchemy", "fastapi", "botocore", "boto3")

#: The tests of tasks, blocks, batches, storage and client.
TESTS: Final = (
    "tests/test_tasks.py",
    "tests/test_blocks.py",
    "tests/test_private_names.py",
    "tests/batch",
    "tests/generation",
    "tests/ledger",
    "tests/storage",
    "tests/api",
)
#: Some of each: what calls other packages most.
QUICK_TESTS: Final = (
    "tests/test_tasks.py",
    "tests/test_blocks.py",
    "tests/test_private_names.py",
    "tests/storage/test_s3.py",
    "tests/storage/test_objects.py",
    "tests/api/test_client.py",
)
SCHEDULE_TEST: Final = "tests/integration/test_schedule.py"

#: Seconds for each step; what takes longer has failed.
_LIMITS: Final = {"install": 900, "demo": 300, "tests": 1800, "schedule": 600}


@dataclass(frozen=True)
class Row:
    """An environment to try.

    Attributes:
        python: major and minor version of the interpreter.
        installed: what `uv pip install` is told besides the package itself.
    """

    name: str
    python: str
    installed: tuple[str, ...]

    @property
    def is_lowest(self) -> bool:
        """Whether the lowest versions of what we need are installed."""
        return any(word.startswith("lowest") for word in self.installed)


@dataclass(frozen=True)
class Result:
    """What came of a row; `status` is "passed", "FAILED" or "NOT RUN"."""

    row: Row
    status: str
    detail: str


def rows_of(text: str) -> list[Row]:
    """Return the rows of the table in `text`."""
    return [
        Row(name, python, tuple(shlex.split(installed.replace("`", ""))))
        for name, python, installed, _found in _LINE.findall(text)
    ]


def with_results(text: str, results: Sequence[Result], day: datetime.date) -> str:
    """Return `text` with what came of each row in the table's last column."""
    by_name = {result.row.name: f"{result.status} on {day}: {result.detail}" for result in results}

    def renewed(line: re.Match[str]) -> str:
        name, python, installed, found = line.groups()
        return f"| `{name}` | {python} |{installed}| {by_name.get(name, found.strip())} |"

    return _LINE.sub(renewed, text)


def find_python(version: str, given: Sequence[Path]) -> Path | None:
    """Return an interpreter of `version` (3.12), or None where this machine has none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    installed = [Path(sys.executable), *([Path(on_path)] if on_path else [])]
    candidates = [*given, *installed, *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    # pyenv puts programs on PATH that only say that they are not there
    return next((path for path in candidates if _version_of(path) == version), None)


def _version_of(python: Path) -> str | None:
    tell = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    try:
        told = subprocess.run([python, "-c", tell], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return told.stdout.strip()


class Environment:
    """The environment of a row: commands run in it, and their output goes to the row's log."""

    def __init__(self, row: Row, base: Path, log: TextIO) -> None:
        self._row, self._base, self._log = row, base, log
        self._folder = WORK / row.name
        self._python = str(self._folder / "bin" / "python")
        self._home = Path(tempfile.mkdtemp(prefix="prefect-home-", dir=WORK))
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TTAPI_"))
        }
        self._environment = kept | {"PREFECT_HOME": str(self._home), "PYTHONPATH": str(ROOT)}

    def steps(self, quick: bool) -> Mapping[str, list[list[str]]]:
        """Return the commands of each step."""
        store = self._home / "demo"
        warnings = ["-o", "filterwarnings=default"] if self._row.is_lowest else []
        pytest = [self._python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *warnings]
        places = ["--store", str(store), "--deliver", str(store / "delivered")]
        run = [self._python, "-m", "prefect_ttapi", "run", "flows/prompts.csv", "--sandbox"]
        return {
            "install": [
                _uv("venv", "-q", "--clear", "--python", str(self._base), str(self._folder)),
                _uv("pip", "install", "-q", "--python", self._python, "-e", ".[dev]", *self._row.installed),
                _uv("pip", "list", "-q", "--python", self._python),
            ],
            "demo": [[*run, *places, "--key", "{shot}/{name}-{index}.{ext}"]],
            "tests": [[*pytest, "-m", "not integration", *(QUICK_TESTS if quick else ("-n", "2", *TESTS))]],
            "schedule": [] if quick else [[*pytest, SCHEDULE_TEST]],
        }

    def run(self, command: Sequence[str], seconds: float) -> str | None:
        """Run a command to its end; return why it failed, or None."""
        print(f"\n$ {shlex.join(command)}", file=self._log, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            return "took too long"
        finally:
            with contextlib.suppress(ProcessLookupError):  # also servers and workers that it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return f"exit status {status}" if status else None

    def versions(self) -> str:
        """Return the versions that matter, as one phrase."""
        listed = subprocess.check_output(
            _uv("pip", "list", "-q", "--format", "json", "--python", self._python)
        )
        found = {package["name"].lower(): package["version"] for package in json.loads(listed)}
        tell = "import platform; print(platform.python_version())"
        python = subprocess.check_output([self._python, "-c", tell], text=True)
        told = [f"{name} {found[name]}" for name in _TOLD if name in found]
        return ", ".join([f"Python {python.strip()}", *told])

    def close(self) -> None:
        """Forget the Prefect home and the demo's images; environment and log stay."""
        shutil.rmtree(self._home, ignore_errors=True)


def _uv(*words: str) -> list[str]:
    return [sys.executable, "-m", "uv", *words]


def try_row(row: Row, pythons: Sequence[Path], quick: bool) -> Result:
    """Make the row's environment and run everything in it, whatever fails but installing."""
    base = find_python(row.python, pythons)
    if base is None:
        return Result(row, "NOT RUN", f"no Python {row.python} on this machine")
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / f"{row.name}.log").open("w", encoding="utf-8") as log:
        environment = Environment(row, base, log)
        try:
            troubles = []
            for step, commands in environment.steps(quick).items():
                end = time.monotonic() + _LIMITS[step]
                found = (environment.run(command, end - time.monotonic()) for command in commands)
                if trouble := next(filter(None, found), None):
                    troubles.append(f"{step}: {trouble}")
                    if step == "install":
                        break
            if troubles:
                return Result(row, "FAILED", f"{', '.join(troubles)}; see {Path(log.name).relative_to(ROOT)}")
            return Result(row, "passed", environment.versions())
        finally:
            environment.close()


def main() -> int:
    """Try the rows that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="ROW", help="rows of the table (default: all)")
    parser.add_argument("--quick", action="store_true", help="some of the tests, no schedule")
    parser.add_argument("--write", action="store_true", help="put what came of it into the table")
    parser.add_argument(
        "--python", action="append", default=[], type=Path, help="an interpreter; may be given again"
    )
    arguments = parser.parse_args()
    text = TABLE.read_text(encoding="utf-8")
    rows = rows_of(text)
    if unknown := set(arguments.names) - {row.name for row in rows}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    results = []
    for row in rows:
        if row.name in arguments.names or not arguments.names:
            print(f"==> {row.name}: Python {row.python} {' '.join(row.installed)}", flush=True)
            started = time.monotonic()
            results.append(try_row(row, arguments.python, arguments.quick))
            print(
                f"    {results[-1].status} after {time.monotonic() - started:.0f} s: {results[-1].detail}",
                flush=True,
            )
            if arguments.write:
                current = TABLE.read_text(encoding="utf-8")
                TABLE.write_text(with_results(current, results[-1:], datetime.date.today()), encoding="utf-8")
    print("\n" + "\n".join(f"{result.status:8} {result.row.name:14} {result.detail}" for result in results))
    statuses = {result.status for result in results}
    return 1 if "FAILED" in statuses else 2 if "NOT RUN" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
