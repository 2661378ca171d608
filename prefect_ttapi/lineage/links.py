"""Where a browser finds what lies in a store, for artifacts to link to."""

from __future__ import annotations

from datetime import datetime
from typing import Final, Protocol


class Links(Protocol):
    """Where a browser finds what lies in a store."""

    @property
    def end(self) -> datetime | None:
        """When the first of the links given so far ends, UTC; None while none of them is signed."""

    def to(self, uri: str) -> str:
        """The address to link to for `uri`; `uri` itself where there is no better one."""


class _Plain:
    end: None = None

    def to(self, uri: str) -> str:
        return uri


#: Links to the addresses as they are.
PLAIN: Final[Links] = _Plain()


def links_end(links: Links) -> list[str]:
    """When the links stop working, where they do; credentials that are temporary themselves may end sooner."""
    return [f"Links are signed and end on {links.end:%Y-%m-%d %H:%M} UTC at the latest."] if links.end else []
