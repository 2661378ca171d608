"""Find the addresses at which a browser can open the objects of a store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.store import ImageStore


class StoreLinks:
    """Links to the objects of some stores, for the artifacts of one run; signed ones are kept nowhere else.

    Attributes:
        end: when the first of the links given so far ends, UTC; None while none of them is signed.
    """

    def __init__(self, *stores: ImageStore | None) -> None:
        self._stores = [store for store in stores if store]
        self.end: datetime | None = None

    def to(self, uri: str) -> str:
        """Return the public address of `uri`, else a signed one, else `uri` itself."""
        found = (self._in(store, uri) for store in self._stores)
        return next((address for address in found if address), uri)

    def notes(self) -> list[str]:
        """Return a line that says when signed links end; temporary credentials may end sooner."""
        return (
            [f"Links are signed and end on {self.end:%Y-%m-%d %H:%M} UTC at the latest."] if self.end else []
        )

    def _in(self, store: ImageStore, uri: str) -> str | None:
        try:
            if store.public_base_url:
                return store.public_url(uri)
            return self._signed(store, uri, store.signed_links) if store.signed_links else None
        except StoreError:  # it is in another store, or in a folder, which signs nothing
            return None

    def _signed(self, store: ImageStore, uri: str, seconds: int) -> str:
        end = datetime.now(UTC) + timedelta(seconds=seconds)
        address = store.presign(uri, seconds)
        self.end = min(self.end or end, end)
        return address


#: Links to the addresses as they are.
PLAIN: Final = StoreLinks()
