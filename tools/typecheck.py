"""Check what people's own code sees: the README's examples, `flows/` and every public name, strictly, without plugins.

python tools/typecheck.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKED = (ROOT / "flows", ROOT / "tests" / "typing")
#: The editor's own type checker and mypy, as strict as they can be.
EDITOR = {"typeCheckingMode": "strict", "pythonVersion": "3.11", "reportMissingTypeStubs": False}
MYPY = ("--strict", "--python-version", "3.11", "--config-file=", "--cache-dir")


def main() -> int:
    """Return 1 where one of the type checkers finds something."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
        for number, block in enumerate(blocks):
            (place / f"readme_{number}.py").write_text(block, encoding="utf-8")
        config = place / "pyrightconfig.json"
        include = [str(path) for path in (place, *CHECKED)]
        config.write_text(json.dumps(EDITOR | {"include": include, "extraPaths": [str(ROOT)]}))
        sources = [str(path) for part in (place, *CHECKED) for path in sorted(part.glob("*.py"))]
        commands = [
            ["basedpyright", "--project", str(config), "--pythonpath", sys.executable],
            ["mypy", *MYPY, str(ROOT / ".mypy_cache" / "plain"), *sources],
        ]
        found = [
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False) for command in commands
        ]
    return int(any(run.returncode for run in found))


if __name__ == "__main__":
    sys.exit(main())
