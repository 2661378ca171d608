"""Reading a store's manifests: which images they name, and which of these are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from prefect_ttapi.cli.findings import Finding, Kind
from prefect_ttapi.cli.listed_images import Images
from prefect_ttapi.cli.records import address_of
from prefect_ttapi.errors import StoreError
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.storage.layout import IMAGES, image_in, split_at
from prefect_ttapi.storage.objects import Listed, NoAnswerError
from prefect_ttapi.storage.store import ImageStore

#: How many rows a finding quotes, and how many images are looked for at once.
_EXAMPLES: Final = 5
_AT_ONCE: Final = 64


@dataclass
class _Rows:
    """Row numbers: how many, and the first of them."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, number: int) -> None:
        if not self.first or self.first[-1] != number:
            self.count += 1
            self.first = [*self.first, number][:_EXAMPLES]

    def __str__(self) -> str:
        rest = self.count - len(self.first)
        return ", ".join(map(str, self.first)) + (f" and {rest:,} more" if rest else "")


def check_manifest(
    store: ImageStore, images: Images, listed: Listed, count: Callable[[], None]
) -> Iterator[Finding]:
    """Note in `images` what a manifest names; what there is to say of the manifest.

    Args:
        count: called for each row.

    Raises:
        NoAnswerError: the store gives no answer.
    """
    uri = address_of(store, listed.key)
    gone, senseless, suspects = _Rows(), _Rows(), list[tuple[int, str]]()
    try:
        with store.objects.fetch(listed.key)() as lines:
            for number, line in enumerate(lines):
                count()
                try:
                    keys = [key for row in read_manifest([line]) for key in _images_of(row)]
                except ValueError:
                    senseless.add(number + 1)
                    continue
                for key in keys:
                    images.name(key)
                suspects += [(number, key) for key in keys if images.size(key) is None]
                if len(suspects) >= _AT_ONCE:
                    _look_for(store, suspects, gone)
                    suspects = []
        _look_for(store, suspects, gone)
    except NoAnswerError:
        raise
    except StoreError as error:
        yield Finding(Kind.UNREADABLE, uri, str(error))
    if senseless.count:
        yield Finding(Kind.SENSELESS, uri, f"{senseless.count:,} lines are no rows: line {senseless}")
    if gone.count:
        yield Finding(Kind.PAST, uri, f"images of {gone.count:,} rows are gone: row {gone}")


def _images_of(row: Row) -> Iterator[str]:
    """Keys of the row's images that are, or once were, in this store."""
    for image in row.images:
        # a store that was moved still knows its images by their content
        _, key = split_at(image.uri, IMAGES) or ("", "")
        if (image_in(key) or ("", ""))[0] == image.sha256:
            yield key


def _look_for(store: ImageStore, suspects: list[tuple[int, str]], gone: _Rows) -> None:
    """Count the rows whose images were not listed and are not there: they may be younger than the listing."""
    sizes = store.objects.sizes([key for _, key in suspects])
    for (number, _), size in zip(suspects, sizes, strict=True):
        if size is None:
            gone.add(number)
