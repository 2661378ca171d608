"""What this package's blocks have in common."""

from __future__ import annotations

from collections.abc import KeysView
from typing import Any, ClassVar


class NotMapped:
    """A block that `.map` takes as one value, with or without `unmapped`.

    `.map` iterates what it can, and a pydantic model would be its fields. Prefect itself reads the fields by
    `dict(block)`, which needs no iteration where there are keys.
    """

    __iter__: ClassVar[Any] = None

    def keys(self) -> KeysView[str]:
        """The names of the fields."""
        return vars(self).keys()

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]
