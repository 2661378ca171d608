"""Count what a newcomer has to find a way through: `python tools/house.py [--walk]`.

`--walk` also follows one prompt through a batch, S3 (moto's server) and delivery, and lists the modules of the package
whose functions it passes, in the order in which it comes to them; it starts a temporary Prefect server, so give it a
minute.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "prefect_ttapi"
_PASSED_OVER = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
)


def code_lines(source: str) -> int:
    """Return the number of lines that hold code: no blank lines, no comments, no docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _PASSED_OVER:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def callables(source: str) -> int:
    """Return the number of parameters and attributes that are annotated as callables."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        annotation = node.annotation if isinstance(node, ast.arg | ast.AnnAssign) else None
        found += annotation is not None and "Callable" in ast.unparse(annotation)
    return found


def static_counts() -> dict[str, object]:
    """Return what can be counted without running anything."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    names = Counter(path.name for path in sources if path.name != "__init__.py")
    doors = {path.relative_to(PACKAGE).parts[0] for path in sources}
    return {
        "modules": len(sources),
        "doors at the top level": len(doors),
        "lines of code": sum(map(code_lines, sources.values())),
        "callable parameters and attributes": sum(map(callables, sources.values())),
        "file names that stand twice": ", ".join(name for name, count in names.items() if count > 1) or 0,
        "longest module": max((source.count("\n"), str(path.name)) for path, source in sources.items()),
    }


def walked() -> list[str]:
    """Return the modules that one prompt passes on its way through a batch, S3 and delivery, the first one first."""
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {
            "PREFECT_HOME": home,
            "XDG_STATE_HOME": home,
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        }
        # the S3 service is that of the tests
        sys.path.insert(0, str(ROOT))
        from prefect_ttapi import ImageStore, TTAPICredentials, generate_batch
        from prefect_ttapi.sandbox import Sandbox
        from tests.support.s3 import moto_server

        passed: dict[str, None] = {}

        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_name != "<module>":
                passed[frame.f_code.co_filename] = None

        with Sandbox(tiny=True) as sandbox, moto_server() as server:
            credentials = TTAPICredentials(api_key="sandbox-key", base_url=sandbox.base_url)
            place, s3 = f"s3://{server.new_bucket()}", server.settings()
            threading.setprofile(note)
            sys.setprofile(note)
            try:
                generate_batch(
                    [{"prompt": "a lighthouse", "model": "gpt-image-1"}],
                    credentials,
                    ImageStore(url=f"{place}/store", **s3),
                    deliver_to=ImageStore(url=f"{place}/shop", **s3),
                )
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
    rooms = {str(path) for path in PACKAGE.rglob("*.py") if "sandbox" not in path.parts}
    return [str(Path(file).relative_to(PACKAGE)) for file in passed if file in rooms]


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--walk", action="store_true", help="also follow one prompt through the package")
    counts = static_counts()
    if parser.parse_args().walk:
        modules = walked()
        counts["modules that one prompt passes"] = len(modules)
        print("\n".join(modules))
    for what, count in counts.items():
        print(f"{what:40} {count}")


if __name__ == "__main__":
    main()
