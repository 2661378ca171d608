from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


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
