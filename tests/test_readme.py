from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefect_ttapi.sandbox import Sandbox

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each Python example of the README runs as it stands, against the sandbox."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTAPI_BASE_URL", sandbox.base_url)
    monkeypatch.setenv("TTAPI_API_KEY", "sandbox")
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {"__name__": "readme"})  # noqa: S102
    assert list((tmp_path / "website").rglob("*.png"))


def test_there_are_examples():
    """The README has Python examples at all."""
    assert EXAMPLES
