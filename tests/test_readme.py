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


def test_links_work_on_a_package_index():
    """A package index has no files beside the README: links lead to whole addresses or to its own headings."""
    headings = {
        "#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", README, flags=re.DOTALL)
    links = re.findall(
        r"\]\(([^)\s]*)|^\[[^\]]+\]:\s*(\S+)|(?:href|src)=[\"']?([^\"'\s>]+)", prose, re.MULTILINE
    )
    targets = {target for found in links for target in found if target}
    assert "https://www.prefect.io" in targets
    assert [target for target in targets - headings if not target.startswith("https://")] == []


def test_files_that_are_named_are_there():
    """Paths in the README's prose lead somewhere in a checkout."""
    paths = re.findall(r"`((?:docs|deployments|flows|benchmarks|tests)/[\w./-]*)`", README)
    assert "docs/versions.md" in paths
    assert [path for path in paths if not (Path(__file__).parent.parent / path).exists()] == []
