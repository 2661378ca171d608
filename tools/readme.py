"""The README as a package index shows it: an index has neither the pages nor the pictures that stand beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def for_an_index(readme: str) -> str:
    r"""Return it without pictures, and with the paths of pages in place of links to them.

    >>> for_an_index("![a](docs/a.webp)\n\nRead [this](docs/b.md) or [that](https://example.com).")
    'Read `docs/b.md` or [that](https://example.com).'
    """
    without_pictures = re.sub(r"^!\[[^]]*]\(docs/[^)]*\)\n\n", "", readme, flags=re.MULTILINE)
    return re.sub(r"\[[^]]*]\((?!https://|#)([^)]*)\)", r"`\1`", without_pictures)


class Readme(MetadataHookInterface):
    """Gives the package its long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set it in the package's metadata."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_an_index(text)}
