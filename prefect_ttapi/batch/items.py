"""Check each request of a batch before anything is paid for, work on it, and make its row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any, BinaryIO

from pydantic import ValidationError

from prefect_ttapi.api.redaction import withholding
from prefect_ttapi.batch.options import BatchOptions
from prefect_ttapi.capabilities import problems_of
from prefect_ttapi.errors import (
    BudgetExceeded,
    IllegalBatchError,
    InsufficientBalanceError,
    KeyTemplateError,
    LaneLostError,
    ModelNotPermittedError,
    PictureError,
    SigningError,
    StoreError,
    TTAPIError,
    UnknownOutcomeError,
)
from prefect_ttapi.generation.budget import Budget
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.generation.engine import Engine
from prefect_ttapi.generation.limits import may_cost, perhaps_paid
from prefect_ttapi.generation.persisting import Paid, other_payments
from prefect_ttapi.images.renditions import GALLERY_BOX, thumbnail_or_none
from prefect_ttapi.images.signing import read_signature
from prefect_ttapi.ledger.ledger import Waiting
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.publishing import balance_exhausted, images_delivered
from prefect_ttapi.lineage.shown import Shown, places, secrets_among
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import GeneratedImage, StoredImage
from prefect_ttapi.stopping import StopSending
from prefect_ttapi.storage.objects import TakenKeys
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

Values = Iterable[Mapping[str, Any]] | Callable[[ImageRequest], Mapping[str, Any]] | None


@dataclass(frozen=True)
class Item:
    """A legal request at its place in the batch, with the values of its key template."""

    row: int
    request: ImageRequest
    values: dict[str, Any] = field(default_factory=dict)
    denied: str = ""  # why the budget does not allow it, so that only a record will do
    known_absent: bool = False  # True: a listing showed no ledger record
    lost_in: tuple[str, ...] = ()  # task runs of this batch that had it and broke down
    keys_free: bool = False  # True: a listing showed nothing at the keys that its images will have

    @property
    def may_pay(self) -> bool:
        """Whether it may be sent."""
        return not self.denied

    @property
    def surely_unsent(self) -> bool:
        """Whether no task run of the batch can have sent it: each was only to look it up."""
        return not self.may_pay and not self.lost_in

    @property
    def recorded(self) -> dict[str, Any]:
        """The values that a manifest may hold."""
        return _without_secrets(self.values)


@dataclass(frozen=True)
class Done:
    """A request's row, its thumbnails (WebP), and how many images it may have cost."""

    row: Row
    thumbnails: tuple[bytes | None, ...] = ()
    images_paid: int = 0


def row_of(item: Item, api_origin: str | None, **facts: Any) -> Row:
    """Return the item's row: skipped, unless `facts` say something else."""
    asked = {"row": item.row, "status": "skipped", "request": item.request, "api_origin": api_origin}
    return Row(request_hash=item.request.request_hash, values=item.recorded, **asked | facts)


def skipped(item: Item, api_origin: str | None, reason: str | None, error_type: str | None) -> Done:
    """Return the item as one that was never sent, and why."""
    return Done(row_of(item, api_origin, error=reason, error_type=error_type))


def never_sent(item: Item, api_origin: str | None, why: str) -> Done:
    """Return the item as one whose task run broke down before it was sent."""
    error = f"not sent, as its task run broke down: {why}"
    return Done(row_of(item, api_origin, status="failed", error=error, error_type=LaneLostError.__name__))


def lost(item: Item, api_origin: str | None, why: str) -> Done:
    """Return the item as one whose task run broke down, so that what became of it is not known if it could be sent."""
    if item.surely_unsent:
        return never_sent(item, api_origin, why)
    return unsure(item, api_origin, f"its task run broke down: {why}", LaneLostError.__name__)


def unsure(item: Item, api_origin: str | None, error: str, error_type: str | None) -> Done:
    """Return the item as one that may be paid for."""
    facts = {"status": "failed", "error": error, "error_type": error_type, "maybe_paid": (error,)}
    return Done(row_of(item, api_origin, **facts), images_paid=item.request.n)


@dataclass(frozen=True)
class Work:
    """Works on the items of a lane: generates and delivers each, and makes its row."""

    engine: Engine
    options: BatchOptions
    delivery: Delivery | None

    def outcome(self, item: Item, waiting: Waiting | None) -> Done | Waiting:
        """Return the item's row, or the claim of another run that it waits for; raise nothing, whatever happens."""
        try:
            return self._outcome(item, waiting)
        except BaseException as error:  # also CancelledError, as of an event loop that was closed
            logger.exception("Request %s failed in a way that is not foreseen", item.request.request_hash)
            return lost(item, self.engine.ledger.api_origin, f"{type(error).__name__}: {error}")

    def _outcome(self, item: Item, waiting: Waiting | None) -> Done | Waiting:
        engine, stop = self.engine, self.engine.limits.stop
        origin = engine.ledger.api_origin
        if stop.reason:
            return skipped(item, origin, stop.reason, stop.error_type)
        shown = self.options.shown
        try:
            with withholding(shown.withheld(item.request)):
                paid = self._paid(item, waiting)
        except BudgetExceeded as error:
            return skipped(item, origin, str(error), "BudgetExceeded")
        except StopSending as error:
            barred = None if stop.reason else ModelNotPermittedError.__name__
            return skipped(item, origin, str(error), barred or stop.error_type)
        except Exception as error:
            asked = row_of(item, origin)
            if isinstance(error, InsufficientBalanceError):
                balance_exhausted(origin, str(error))
            elif not isinstance(error, TTAPIError | StoreError):
                logger.exception("Request %s failed in a way that is not foreseen", asked.request_hash)
            # what a task run that broke down may have sent is told by the ledger
            ours = isinstance(error, UnknownOutcomeError) and bool(item.lost_in or item.known_absent)
            return Done(failed(asked, error), images_paid=item.request.n if ours or may_cost(error) else 0)
        if isinstance(paid, Waiting):
            return paid
        paid = of_this_batch(paid, *item.lost_in, engine.run.task_run_id)
        row = self._delivered(row_of_paid(item, paid), paid, item)
        images_paid = len(paid.generation.images) if paid.sent else 0
        if not self.options.thumbnails:
            return Done(row, images_paid=images_paid)
        return looked_at(row, engine.store, paid.fresh, images_paid)

    def _paid(self, item: Item, waiting: Waiting | None) -> Paid | Waiting:
        spending = self.engine.limits.spending
        barred = self.engine.limits.barred.get(item.request.model)
        if barred or not item.may_pay:
            if item.may_pay:
                spending.settle(item.request, 0, None)
            if found := self.engine.look_up(item.request):
                return found
            if barred:
                raise StopSending(barred)
            raise BudgetExceeded(item.denied)
        if passed := spending.passed():  # what is reserved for it is free again
            spending.settle(item.request, 0, None)
            raise BudgetExceeded(passed)
        return self.engine.try_generate(
            item.request,
            waiting,
            known_absent=item.known_absent,
            before_sending=None if item.keys_free else partial(self._check_keys, item),
        )

    def _check_keys(self, item: Item) -> None:
        """Raise KeyTakenError where the item's images could not be delivered."""
        if self.delivery is not None and not self.delivery.overwrite:
            with self.delivery.to.before_paying(self.engine.limits.stop):
                prompt = self.options.shown.prompt(item.request)
                self.delivery.check_free(self.delivery.keys(item.request, item.values, prompt))

    def _delivered(self, row: Row, paid: Paid, item: Item) -> Row:
        """Return the row with its copies, or failed with its images where they could not be delivered."""
        if self.delivery is None:
            return row
        shown, made = self.options.shown, paid.generation
        try:
            originals = self.delivery.originals(made, paid.fresh)
            copies = self.delivery.deliver(made, item.values, shown.prompt(made.request), originals)
        except Exception as error:
            if not isinstance(error, StoreError | KeyTemplateError | PictureError | SigningError):
                logger.exception("Delivering %s failed in a way that is not foreseen", row.request_hash)
            return failed(row, error)
        images_delivered(made, copies, shown)
        return row.model_copy(update={"delivered": tuple(copies)})


def of_this_batch(paid: Paid, *task_runs: str | None) -> Paid:
    """Return `paid` as sent by this batch if one of these task runs, some of which broke down later, sent it."""
    made = paid.generation.task_run_id
    return paid if made is None or made not in task_runs else replace(paid, sent=True)


def row_of_paid(item: Item, paid: Paid) -> Row:
    """Return the row of a request whose images are in the store."""
    maybe_paid, also_paid = other_payments(paid)
    return Row.of(
        item.row,
        paid.generation,
        "generated" if paid.sent else "cached",
        maybe_paid=maybe_paid,
        also_paid=also_paid,
        values=item.recorded,
        ledger_tag=paid.record.tag,
        ledger_size=paid.record.size,
    )


def failed(row: Row, error: Exception) -> Row:
    """Return the row of a request that ended in `error`."""
    calls = {"api_calls": error.attempts, "seconds": error.elapsed} if isinstance(error, TTAPIError) else {}
    paid = {"maybe_paid": (*row.maybe_paid, str(error))} if not row.images and perhaps_paid(error) else {}
    failure = {"status": "failed", "error": str(error), "error_type": type(error).__name__}
    return row.model_copy(update=failure | calls | paid)


def looked_at(
    row: Row, store: ImageStore, fresh: Sequence[GeneratedImage] = (), images_paid: int = 0
) -> Done:
    """Return the row with who signed its images, and their thumbnails: of the bytes at hand, or else from the store."""
    openers = [image.open for image in fresh] or [partial(store.open, image.uri) for image in row.images]
    images = tuple(_with_signature(*pair) for pair in zip(row.images, openers, strict=True))
    thumbnails = tuple(thumbnail_or_none(opener, GALLERY_BOX) for opener in openers)
    return Done(row.model_copy(update={"images": images}), thumbnails, images_paid)


def _with_signature(image: StoredImage, opener: Callable[[], BinaryIO]) -> StoredImage:
    if "credentials" not in (image.marks or ()):
        return image
    try:
        with opener() as file:
            signature = read_signature(file, image.media_type)
    except (StoreError, OSError) as error:
        logger.warning("Nobody knows who signed %s: %s", image.uri, error)
        return image
    return image.model_copy(update={"signature": signature and str(signature)})


@dataclass(frozen=True)
class Intake:
    """The items of a batch in order; of an illegal one, its failed row.

    Attributes:
        total: how many there are; None where that can't be known.
        hashes: of all requests, where they are known.
    """

    items: Iterator[Item | Done]
    total: int | None
    hashes: frozenset[bytes] = frozenset()


def take_in(
    requests: Iterable[ImageRequest | Mapping[str, Any] | str],
    values: Values,
    keys: KeyCheck | None,
    budget: Budget | None,
) -> Intake:
    """Return the batch's items: a sequence checked whole, an iterator as it is read, each problem a failed row.

    Raises:
        IllegalBatchError: a sequence holds illegal requests, or leads to key collisions.
    """
    if isinstance(requests, Mapping | str | bytes | ImageRequest):
        raise IllegalBatchError(["requests must be an iterable of requests, not a single one"])
    if not isinstance(requests, Iterable):
        raise IllegalBatchError([f"requests must be an iterable of requests, not {type(requests).__name__}"])
    if not isinstance(requests, Sequence):
        return Intake(_naming_secrets(_items(requests, values, keys, budget)), None)
    if not (values is None or callable(values) or isinstance(values, Sequence)):
        values = list(values)
    if isinstance(values, Sequence) and len(values) != len(requests):
        raise IllegalBatchError([f"there are {len(requests)} requests but {len(values)} values"])
    hashes: set[bytes] = set()
    failed: dict[str, list[int]] = {}
    for item in _items(requests, values, keys, budget):
        if isinstance(item, Done):
            failed.setdefault(item.row.error or "", []).append(item.row.row)
        else:
            hashes.add(bytes.fromhex(item.request.request_hash))
    if failed:
        raise IllegalBatchError([f"{places('request', rows)}: {error}" for error, rows in failed.items()])
    # read again as they are needed: to keep them all would take a hundred times the memory of their hashes
    return Intake(_naming_secrets(_items(requests, values, None, None)), len(requests), frozenset(hashes))


class KeyCheck:
    """Finds keys that two images would have, and keys that can't be used, before anything is paid for."""

    def __init__(self, delivery: Delivery, shown: Shown) -> None:
        self._delivery = delivery
        self._shown = shown
        self._taken = TakenKeys()

    def problem(self, item: Item) -> str | None:
        """Return what is wrong with the item's keys, or None; the keys are then its own."""
        try:
            prompt = self._shown.prompt(item.request)
            keys = self._delivery.keys(item.request, item.values, prompt).planned()
            for key in keys:
                self._delivery.to.objects.uri(key)
        except (KeyTemplateError, StoreError) as error:
            return str(error)
        problems = (
            self._taken.take(key, f"{item.request.request_hash}-{index}", item.row)
            for index, key in enumerate(keys)
        )
        return next((problem for problem in problems if problem), None)


def _items(
    requests: Iterable[ImageRequest | Mapping[str, Any] | str],
    values: Values,
    keys: KeyCheck | None,
    budget: Budget | None,
) -> Iterator[Item | Done]:
    given_values = iter(values) if values is not None and not callable(values) else repeat({})
    for row, given in enumerate(requests):
        try:
            request = ImageRequest.model_validate({"prompt": given} if isinstance(given, str) else given)
            mine = values(request) if callable(values) else next(given_values)
        except ValidationError as error:
            yield _refused(row, given, "; ".join(problems_of(error)), "ValidationError")
            if not callable(values):
                next(given_values, None)
            continue
        except StopIteration:
            yield _refused(row, given, "there are fewer values than requests")
            continue
        if not isinstance(mine, Mapping):
            kind = type(mine).__name__
            yield _refused(row, given, f"its values must be a mapping of names, not {kind}")
            continue
        item = Item(row, request, dict(mine))
        unpriced = budget.problem(request) if budget else None
        collision = keys.problem(item) if keys else None
        if problem := unpriced or collision:
            error_type = "ValueError" if unpriced else "KeyTemplateError"
            yield Done(row_of(item, None, status="failed", error=problem, error_type=error_type))
        else:
            yield item


def _refused(row: int, given: Any, error: str, error_type: str = "ValueError") -> Done:
    given = _without_secrets(given) if isinstance(given, Mapping) else given
    return Done(Row(row=row, status="failed", given=given, error=error, error_type=error_type))


def _without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    secrets = secrets_among(values)
    return {name: value for name, value in values.items() if name not in secrets}


def _naming_secrets(items: Iterable[Item | Done]) -> Iterator[Item | Done]:
    """Warn of values that look like a secret as the batch is read, not where it is only checked before."""
    told: set[str] = set()
    for item in items:
        for name in secrets_among(item.values) - told if isinstance(item, Item) else ():
            logger.warning("values of %r look like a secret: they are not copied into the manifest", name)
            told.add(name)
        yield item
