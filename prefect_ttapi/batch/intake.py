"""What goes into a batch: requests and the values of their keys, checked before anything is paid for."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from pydantic import ValidationError

from prefect_ttapi.batch.items import Item, row_of
from prefect_ttapi.errors import IllegalBatchError, KeyTemplateError, StoreError
from prefect_ttapi.generation.budget import Budget
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.shown import Shown, secrets_among
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import TakenKeys

logger = logging.getLogger(__name__)

Values = Iterable[Mapping[str, Any]] | Callable[[ImageRequest], Mapping[str, Any]] | None


@dataclass(frozen=True)
class Intake:
    """The items of a batch in order, each a legal item or a failed row.

    Attributes:
        total: how many there are; None where that can't be known.
        hashes: of all requests, where they are known.
    """

    items: Iterator[Item | Row]
    total: int | None
    hashes: frozenset[bytes] = frozenset()


def take_in(
    requests: Iterable[ImageRequest | Mapping[str, Any]],
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
        return Intake(_items(requests, values, keys, budget, set()), None)
    if not (values is None or callable(values) or isinstance(values, Sequence)):
        values = list(values)
    if isinstance(values, Sequence) and len(values) != len(requests):
        raise IllegalBatchError([f"there are {len(requests)} requests but {len(values)} values"])
    hashes: set[bytes] = set()
    told: set[str] = set()
    failed: list[Row] = []
    for item in _items(requests, values, keys, budget, told):
        if isinstance(item, Row):
            failed.append(item)
        else:
            hashes.add(bytes.fromhex(item.request.request_hash))
    if failed:
        raise IllegalBatchError(_told_once(failed))
    # read again as they are needed: to keep them all would take a hundred times the memory of their hashes
    return Intake(_items(requests, values, None, None, told), len(requests), frozenset(hashes))


class KeyCheck:
    """Refuses what would put two images under one key, or one where it can't be, before either is paid for."""

    def __init__(self, delivery: Delivery, shown: Shown) -> None:
        self._delivery = delivery
        self._shown = shown
        self._taken = TakenKeys()

    def problem(self, item: Item) -> str | None:
        """Return what is wrong with the item's keys, or None; the keys are then its own."""
        try:
            keys = self._delivery.planned_keys(item.request, item.values, self._shown.prompt(item.request))
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
    requests: Iterable[ImageRequest | Mapping[str, Any]],
    values: Values,
    keys: KeyCheck | None,
    budget: Budget | None,
    told: set[str],
) -> Iterator[Item | Row]:
    given_values = iter(values) if values is not None and not callable(values) else repeat({})
    for row, given in enumerate(requests):
        try:
            request = ImageRequest.model_validate(given)
            mine = values(request) if callable(values) else next(given_values)
        except ValidationError as error:
            yield _refused(row, given, "; ".join(problems_of(error)), "ValidationError")
            if not callable(values):
                next(given_values, None)
            continue
        except StopIteration:
            yield _refused(row, given, "there are fewer values than requests", "ValueError")
            continue
        if not isinstance(mine, Mapping):
            kind = type(mine).__name__
            yield _refused(row, given, f"its values must be a mapping of names, not {kind}", "ValueError")
            continue
        item = Item(row, request, dict(mine))
        _warn_of_secrets(mine, told)
        unpriced = budget.problem(request) if budget else None
        collision = keys.problem(item) if keys else None
        if unpriced:
            yield _with_problem(item, unpriced, "ValueError")
        elif collision:
            yield _with_problem(item, collision, "KeyTemplateError")
        else:
            yield item


def _warn_of_secrets(values: Mapping[str, Any], told: set[str]) -> None:
    for name in secrets_among(values) - told:
        logger.warning("values of %r look like a secret: they are not copied into the manifest", name)
        told.add(name)


def _with_problem(item: Item, problem: str, error_type: str) -> Row:
    update = {"status": "failed", "error": problem, "error_type": error_type}
    return row_of(item, api_origin=None).model_copy(update=update)


def _refused(row: int, given: Any, error: str, error_type: str) -> Row:
    return Row(row=row, status="failed", given=given, error=error, error_type=error_type)


def _told_once(failed: Iterable[Row]) -> list[str]:
    """Return a line per problem, with the requests that have it: `requests 1, 2 and 7 more: ...`."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row in failed:
        rows[row.error or ""].append(row.row)
    return [f"{_requests(positions)}: {problem}" for problem, positions in rows.items()]


def _requests(positions: Sequence[int]) -> str:
    shown = ", ".join(map(str, positions[:5]))
    more = f" and {len(positions) - 5} more" if len(positions) > 5 else ""
    return f"request{'s' if len(positions) > 1 else ''} {shown}{more}"


def problems_of(error: ValidationError) -> list[str]:
    """Return a line per problem: `size is '1x1' for dall-e-3; legal: ...`."""
    return [
        f"{'.'.join(map(str, problem['loc'])) or 'request'} {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors(include_url=False, include_input=False)
    ]
