"""What the documentation site's Markdown has besides: tables that are made of the code."""

from __future__ import annotations

import re
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

from tools.reference import TABLES


class _Tables(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return [made for line in lines for made in self._made(line)]

    def _made(self, line: str) -> list[str]:
        asked = re.fullmatch(r"\{\{ ([a-z-]+) \}\}", line)
        return TABLES[asked[1]]().splitlines() if asked else [line]


class Tables(Extension):
    """Puts a table where a line says `{{ models }}`; an unknown name ends the build."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Markdown's name
        """Have tables made before anything else is read."""
        md.preprocessors.register(_Tables(md), "tables", 100)


def makeExtension(**options: Any) -> Tables:  # noqa: N802 - Markdown's name
    """Return the extension."""
    return Tables(**options)
