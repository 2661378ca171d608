"""The README: short, with pictures that are there, and fit for a package index, which has nothing beside it."""

from __future__ import annotations

import re
from pathlib import Path

from tools.readme import for_an_index

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: Bytes of a picture that whoever reads the README fetches.
LARGEST_PICTURE = 150_000


def targets(text: str) -> set[str]:
    """Where links and pictures of a text lead."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(
        r"\]\(([^)\s]*)|^\[[^\]]+\]:\s*(\S+)|(?:href|src)=[\"']?([^\"'\s>]+)", prose, re.MULTILINE
    )
    return {target for targets in found for target in targets if target}


def test_it_is_short() -> None:
    assert len(README.split()) <= 700


def test_links_lead_somewhere() -> None:
    """Links lead to whole addresses, or to files of a checkout, of which two are small pictures."""
    files = [ROOT / target for target in targets(README) if not target.startswith("https://")]
    assert [path for path in files if not path.is_file()] == []
    pictures = [path for path in files if path.suffix == ".webp"]
    assert len(pictures) == 2
    assert all(path.stat().st_size <= LARGEST_PICTURE for path in pictures)


def test_links_work_on_a_package_index() -> None:
    """There, pages are named by their paths, pictures are left out, and what remains are whole addresses."""
    shown = for_an_index(README)
    assert "https://www.prefect.io" in targets(shown)
    assert [target for target in targets(shown) if not target.startswith("https://")] == []
    assert "`docs/troubleshooting.md`" in shown
    assert ".webp" not in shown
