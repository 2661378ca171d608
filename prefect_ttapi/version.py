"""The package's version: what `pyproject.toml` builds, and what records and objects say made them."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
