"""Find out by listings what of a batch is already paid for, not by a look-up for each request.

One listing of the ledger tells which requests have a record, one of the images which of these are there, one of the
place to deliver to at which keys there is something. Where the listing shows that a record is as it was, what it says
comes from the manifests of earlier batches of the same name, else from the record itself. Where listing would cost more
than looking, as in a huge old store, it ends early.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, takewhile
from typing import Final

from prefect_ttapi.batch.items import Done, Intake, Item, failed, looked_at, row_of, row_of_paid
from prefect_ttapi.batch.options import Plan
from prefect_ttapi.errors import KeyTemplateError, StoreError
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.generation.persisting import Paid
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.gallery import ThumbnailPack
from prefect_ttapi.lineage.manifest import Row, RowFile
from prefect_ttapi.results import DeliveredImage, StoredImage
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.storage.keys import of_any_size
from prefect_ttapi.storage.layout import BATCHES, IMAGES, MANIFEST, THUMBNAILS, image_key, latest_key
from prefect_ttapi.storage.objects import Listed
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Records read side by side, and how many may wait for the one before them.
_LOOK_UPS: Final = 16
_WINDOW: Final = 64

#: Listing an object costs about a tenth of looking it up (measured on S3); what is listed is kept in memory.
_LISTED_PER_LOOK_UP: Final = 10
_LEAST_LISTED: Final = 1_000
_MOST_LISTED: Final = 200_000


@dataclass(frozen=True)
class Listing:
    """Objects by key: all that are below a prefix, if it is `complete`."""

    objects: dict[str, Listed] = field(default_factory=dict)
    complete: bool = True

    def find(self, key: str) -> str | None:
        """Return the object that stands at a likely key; None where there is none."""
        any_size = of_any_size(key)
        if any_size is None:
            return key if key in self.objects else None
        beginning, pattern = any_size
        near = islice(self._in_order, bisect_left(self._in_order, beginning), None)
        return next(filter(pattern.fullmatch, takewhile(lambda name: name.startswith(beginning), near)), None)

    @cached_property
    def _in_order(self) -> list[str]:
        return sorted(self.objects)

    def shows(self, key: str, size: int | None, tag: str | None) -> bool:
        """Whether the object stands as it was when it had this length and tag."""
        listed = self.objects.get(key)
        return listed is not None and (listed.size, listed.tag) == (size, tag)


def listing(
    store: ImageStore, prefix: str, most: int, stop: Stop, wanted: Collection[bytes] | None = None
) -> Listing:
    """Return the objects below `prefix`, looking at `most` of them, until it is stopped.

    Args:
        wanted: the hashes that the names of the objects are to have, if not any name will do.
    """
    found: dict[str, Listed] = {}
    try:
        with store.before_paying(stop):
            everything = store.list(prefix)
            for listed in islice(everything, most):
                if stop.cancelled:
                    return Listing(found, complete=False)
                if wanted is None or _hash_in(listed.key) in wanted:
                    found[listed.key] = listed
            complete = next(everything, None) is None
    except (StoreError, StopSending) as error:  # who may not list may still look up
        logger.warning("What is there is looked up one by one, as the store can't be listed: %s", error)
        complete = False
    return Listing(found, complete)


def _hash_in(key: str) -> bytes | None:
    try:
        return bytes.fromhex(key.rpartition("/")[2].removesuffix(".json"))
    except ValueError:
        return None


def sort_out(intake: Intake, ledger: Ledger, plan: Plan, stop: Stop) -> Iterator[Item | Done]:
    """Yield, in order, what became of the requests that are paid for, and of illegal ones; else the item itself.

    Without the hashes of all requests, nothing is listed.

    Args:
        stop: once it is cancelled the rest is given as it comes, and nothing more is looked at.
    """
    if not intake.hashes:
        yield from intake.items
        return
    with ExitStack() as stack:
        known = Known(ledger, plan, intake.hashes, stop, stack)
        window: deque[Item | Done | Future[Item | Done]] = deque()
        for item in intake.items:
            window.append(item if isinstance(item, Done) or stop.cancelled else known.of(item))
            while window and (len(window) > _WINDOW or not isinstance(window[0], Future)):
                yield _resolved(window.popleft())
        yield from map(_resolved, window)


def _resolved(found: Item | Done | Future[Item | Done]) -> Item | Done:
    return found.result() if isinstance(found, Future) else found


class Known:
    """Tells the requests of a batch that are paid for from those that are still to be sent, or to be delivered.

    Args:
        wanted: the hashes of all requests.
        stop: ends listings and look-ups.
        stack: has what is to be closed afterwards.
    """

    def __init__(
        self, ledger: Ledger, plan: Plan, wanted: Collection[bytes], stop: Stop, stack: ExitStack
    ) -> None:
        self._store = store = ledger.store
        self._ledger = ledger
        self._plan = plan
        self._stop = stop
        self._delivery = delivery = plan.options.delivery(plan.run.date)
        most = min(max(_LEAST_LISTED, _LISTED_PER_LOOK_UP * len(wanted)), _MOST_LISTED)
        self._records = listing(store, ledger.documents.prefix, most, stop, wanted)
        some = bool(self._records.objects)
        self._images = listing(store, IMAGES, most, stop) if some else Listing()
        self._copies = Listing()
        if delivery and not delivery.overwrite:
            self._copies = listing(delivery.to, delivery.beginning, most, stop)
        self._earlier = Earlier(
            store,
            plan.options.name,
            ledger.api_origin,
            wanted if some and not stop.cancelled else (),
            thumbnails=plan.options.thumbnails,
        )
        stack.callback(self._earlier.close)
        threads = ThreadPoolExecutor(_LOOK_UPS, thread_name_prefix="ttapi-look-up")
        self._threads = stack.enter_context(threads)

    def of(self, item: Item) -> Item | Done | Future[Item | Done]:
        """Return what is known of the item, or what another thread will know, which looks into the store."""
        request_hash = item.request.request_hash
        listed = self._records.objects.get(self._ledger.documents.key(request_hash))
        if listed is None:
            return self._unpaid(replace(item, known_absent=self._records.complete))
        row = self._earlier.row(request_hash)
        if row is not None and len(row.images) == item.request.n and self._stands(row, listed):
            copies = self._standing_copies(item, row)
            return item if copies is None else self._again(item, row, copies)
        # a record is read once: by the lane, where that has to deliver or may have to pay anew
        needs_lane = self._delivery is not None or self._plan.not_before is not None
        return item if needs_lane else self._threads.submit(self._read, item)

    def _unpaid(self, item: Item) -> Item | Future[Item | Done]:
        """Return what is known of an item without a record, above all whether its images can have their keys."""
        if self._delivery is None or self._delivery.overwrite:
            return replace(item, keys_free=True)
        prompt = self._plan.options.shown.prompt(item.request)
        keys = self._delivery.keys(item.request, item.values, prompt)
        taken = next(filter(None, map(self._copies.find, keys.likely())), None)
        if taken is not None and item.known_absent:
            return self._threads.submit(self._refused, self._delivery, item, taken)
        return replace(item, keys_free=taken is None and self._copies.complete)

    def _refused(self, delivery: Delivery, item: Item, key: str) -> Item | Done:
        """Return the item as one that is not sent, unless somebody has paid for it, and delivered it, since."""
        try:
            with self._store.before_paying(self._stop):
                if self._ledger.documents.read(item.request.request_hash) is not None:
                    return replace(item, known_absent=False)
            with delivery.to.before_paying(self._stop):
                taken = delivery.taken(key, item.request.request_hash)
                return Done(failed(row_of(item, self._ledger.api_origin), taken))
        except (StoreError, StopSending):
            return item  # its lane meets the store's error, or the stop

    def _stands(self, row: Row, listed: Listed) -> bool:
        """Whether an earlier row still says what the ledger says, and its images are there."""
        made, since = row.created_at, self._plan.not_before
        young = since is None or (made is not None and made.tzinfo is not None and made >= since)
        same = (row.ledger_size, row.ledger_tag) == (listed.size, listed.tag)
        return young and same and bool(row.images) and not self._missing(row.images)

    def _missing(self, images: Iterable[StoredImage]) -> list[StoredImage]:
        """Return those of `images` that the listing does not show in full, at their place in this store."""
        return [image for image in images if not self._is_there(image)]

    def _is_there(self, image: StoredImage) -> bool:
        key = image_key(image.sha256, image.media_type)
        listed = self._images.objects.get(key)
        return listed is not None and listed.size == image.size_bytes and image.uri == self._store.uri(key)

    def _standing_copies(self, item: Item, row: Row) -> tuple[DeliveredImage, ...] | None:
        """Return the row's copies under the keys that the item asks for; None where one is still to be made."""
        delivery = self._delivery
        if delivery is None:
            return ()
        if delivery.overwrite:
            return None
        try:
            prompt = self._plan.options.shown.prompt(item.request)
            places = delivery.places(delivery.keys(item.request, item.values, prompt), row.images)
        except KeyTemplateError:
            return None
        known = {copy.uri: copy for copy in row.delivered}
        copies = [known.get(delivery.to.uri(place.key)) for place in places]
        standing = tuple(
            copy.model_copy(update={"url": delivery.to.public_url(copy.uri)})
            for place, copy in zip(places, copies, strict=True)
            if copy
            and place.is_of(copy, delivery.provenance)
            and self._copies.shows(place.key, copy.size_bytes, copy.etag)
        )
        return standing if len(standing) == len(places) else None

    def _again(self, item: Item, row: Row, copies: tuple[DeliveredImage, ...]) -> Done | Future[Item | Done]:
        again = row.again(item.row, request=item.request, values=item.recorded, delivered=copies)
        if not self._plan.options.thumbnails:
            return Done(again)
        thumbnails = self._earlier.thumbnails(row)
        if None not in thumbnails:
            return Done(again, thumbnails)
        return self._threads.submit(looked_at, again, self._store)

    def _read(self, item: Item) -> Item | Done:
        try:
            listed = self._images.complete
            with self._store.before_paying(self._stop):
                record = self._ledger.look_up(item.request.request_hash, check_images=not listed)
        except (StoreError, StopSending):
            return item  # its lane meets the store's error, or the stop
        if record is None or record.rest or (listed and self._missing(record.generation.images)):
            return item  # its lane pays for it, or has the rest of its images
        row = row_of_paid(item, Paid(record, sent=False))
        return looked_at(row, self._store) if self._plan.options.thumbnails else Done(row)


#: How many manifests a name's document keeps: a run that was cut short, or had a part of the requests, hides nothing.
KEPT: Final = 3

#: In a manifest's line the request's hash stands before anything that a prompt could imitate.
_HASH: Final = re.compile(rb'^\{"row":\d+,"status":"[a-z]+","request_hash":"([0-9a-f]{64})"')


def remember(
    store: ImageStore, name: str, api_origin: str, folder: str, *, with_prompts: bool = True
) -> None:
    """Note the folder of a batch that has ended; if that fails, the next batch has to look into the ledger.

    Args:
        with_prompts: whether the batch's page shows them.
    """
    key = latest_key(name, api_origin)
    try:
        earlier = last_folders(store, name, api_origin)
        earlier.pop(folder, None)
        known = {folder: with_prompts} | earlier
        folders = list(known)[:KEPT]
        withheld = [each for each in folders if not known[each]]
        told = {"name": name, "api_origin": api_origin, "folders": folders, "without_prompts": withheld}
        store.write(key, json.dumps(told, indent=1).encode(), "application/json")
    except StoreError as error:
        logger.warning("What this batch made is not noted for the next one: %s", error)


def last_folders(store: ImageStore, name: str, api_origin: str) -> dict[str, bool]:
    """Return the folders of the last batches of a name that have a manifest, and whether their pages show prompts.

    Raises:
        StoreError: the store fails.
    """
    try:
        told = json.loads(store.read(latest_key(name, api_origin)) or b"{}")
        folders, withheld = told["folders"], told.get("without_prompts", [])
        legal = (folder for folder in folders if isinstance(folder, str) and folder.startswith(BATCHES))
        return {folder: folder not in withheld for folder in legal}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


class Earlier:
    """The rows of earlier manifests that may stand for the requests of a batch, in a temporary file."""

    def __init__(
        self, store: ImageStore, name: str, api_origin: str, wanted: Collection[bytes], thumbnails: bool
    ) -> None:
        self._rows = RowFile()
        self._numbers: dict[bytes, int] = {}  # of a request's row in there
        self._packs: list[ThumbnailPack | None] = []  # of each row
        self._close = ExitStack()
        try:
            folders = last_folders(store, name, api_origin)
        except StoreError:
            return
        for folder in folders:
            if len(self._numbers) < len(wanted):
                self._add(store, folder, wanted, thumbnails)

    def _add(self, store: ImageStore, folder: str, wanted: Collection[bytes], thumbnails: bool) -> None:
        try:
            manifest = store.open(store.uri(f"{folder}/{MANIFEST}"))
        except StoreError:
            return  # deleted since
        pack = ThumbnailPack.of(store, store.uri(f"{folder}/{THUMBNAILS}")) if thumbnails else None
        if pack is not None:
            self._close.callback(pack.close)
        with manifest:
            for line in manifest:
                found = _HASH.match(line)
                request = bytes.fromhex(found[1].decode()) if found else b""
                if request in wanted and request not in self._numbers and b'"ledger_tag":"' in line:
                    self._numbers[request] = self._rows.append(line)
                    self._packs.append(pack)

    def close(self) -> None:
        """Close the files of thumbnails."""
        self._close.close()

    def row(self, request_hash: str) -> Row | None:
        """Return what the last of these manifests says of a request, or None."""
        number = self._numbers.get(bytes.fromhex(request_hash))
        try:
            row = None if number is None else self._rows.row(number)
        except ValueError:
            return None
        return row if row and row.request_hash == request_hash else None

    def thumbnails(self, row: Row) -> tuple[bytes | None, ...]:
        """Return the pictures that the row's batch showed of its images; None where there is none."""
        number = self._numbers.get(bytes.fromhex(row.request_hash or ""))
        pack = None if number is None else self._packs[number]
        return tuple(pack.get(image.sha256) if pack else None for image in row.images)
