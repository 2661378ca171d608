"""Images with what is known of them, one by one: what galleries are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.responses import DeliveredImage, StoredImage


@dataclass(frozen=True)
class Picture:
    """One image of a row.

    Attributes:
        row: the request it answers.
        image: where it is stored.
        thumbnail: a small WebP of it, or None where none could be made.
    """

    row: Row
    image: StoredImage
    thumbnail: bytes | None = None

    @property
    def delivered(self) -> tuple[DeliveredImage, ...]:
        """Its copies under the names consumers know."""
        return tuple(copy for copy in self.row.delivered if copy.source_uri == self.image.uri)

    @property
    def uri(self) -> str:
        """The address to look at: a delivered copy's public one, else that copy's, else the stored one."""
        public = [copy.url for copy in self.delivered if copy.url]
        return (public or [copy.uri for copy in self.delivered] or [self.image.uri])[0]


def pictures(rows: Iterable[Row], thumbnail_of: Callable[[StoredImage], bytes | None]) -> Iterator[Picture]:
    """Every image of `rows`, in order; `thumbnail_of` is asked when its turn comes."""
    for row in rows:
        for image in row.images:
            yield Picture(row, image, thumbnail_of(image))
