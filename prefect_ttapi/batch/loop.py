"""A batch at work: requests are read, lanes are submitted as room comes up, and each request's row is recorded."""

from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from traceback import format_exception_only
from typing import Any, Final

from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture
from prefect.settings import get_current_settings
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from prefect_ttapi.batch.dispatch import Dispatch, Lost
from prefect_ttapi.batch.items import Done, Item, failed, of_this_batch, row_of_paid
from prefect_ttapi.batch.items import lost as lost_item
from prefect_ttapi.batch.lanes import Lane, Plan, Shared, generate_lane, tell_elsewhere
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import LaneLostError, StoreError
from prefect_ttapi.generation.persisting import Paid
from prefect_ttapi.generation.runs import run_log, to_the_end
from prefect_ttapi.ledger.documents import line_of
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Seconds for writing down rows when nobody waits any longer.
_LAST_ROWS: Final = 2.0

#: Seconds between looks whether the batch was cancelled.
_POLL: Final = 0.1

#: How many items may be read from the source that nobody has taken yet.
_AHEAD: Final = 16


@dataclass(frozen=True)
class Came:
    """The source gave one more."""

    item: Item | Done


@dataclass(frozen=True)
class Ended:
    """The source gives no more, perhaps because it broke."""

    error: BaseException | None = None


@dataclass(frozen=True)
class _Returned:
    """A lane's task run has ended."""

    lane: Lane
    future: PrefectFuture[Any] | Future[Any]


@dataclass(frozen=True)
class _Leave:
    """Nobody waits for what is under way any longer."""


_Event = Came | Ended | _Returned | _Leave
Submit = Callable[[Lane], PrefectFuture[Any] | Future[Any]]


class Source:
    """Reads items a few ahead, in a thread of its own: a source that is slow, or hangs, holds up nothing else.

    Args:
        items: read in a thread with the context of `start`.
        events: told of each item, and of the end.
        stop: once it is cancelled, nothing more is read from a source that has no known end.
        bounded: the source has an end, so that all of it is read.
    """

    def __init__(
        self, items: Iterator[Item | Done], events: queue.SimpleQueue[Any], stop: Stop, *, bounded: bool
    ) -> None:
        self._items = items
        self._events = events
        self._stop = stop
        self._bounded = bounded
        self._room = threading.Semaphore(_AHEAD)
        self._untaken = 0

    def start(self) -> None:
        """Begin to read."""
        context = copy_context()
        threading.Thread(target=context.run, args=(self._read,), name="ttapi-source", daemon=True).start()

    def taken(self, left: int) -> None:
        """Make room: of the items told so far, only so many are still at hand."""
        for _ in range(self._untaken - left):
            self._untaken -= 1
            self._room.release()

    def told(self) -> None:
        """Count an item that was told."""
        self._untaken += 1

    @property
    def unwanted(self) -> bool:
        """Whether the rest is not read, and has no rows."""
        return self._stop.cancelled and not self._bounded

    def _read(self) -> None:
        error: BaseException | None = None
        try:
            while self._room.acquire() and not self.unwanted:
                self._events.put(Came(next(self._items)))
        except StopIteration:
            pass
        except BaseException as broken:
            error = broken
        self._events.put(Ended(error))


class Running:
    """Brings each request of a batch to its row.

    Args:
        dispatch: decides what goes into the next lane, and has the rows.
        shared: what the lanes in this process share.
        ledger: says what costs nothing once the budget is used up.
        plan: of the batch.
        record: is given each row, in one thread.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        shared: Shared,
        ledger: Ledger,
        plan: Plan,
        record: Callable[[Done], None],
    ) -> None:
        self._dispatch = dispatch
        self._shared = shared
        self._stop = shared.stop
        self._ledger = ledger
        self._plan = plan
        self._record = record
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._begun: dict[Lane, float] = {}
        self._signal: BaseException | None = None  # of a task run's future
        self._left = self._told_elsewhere = False
        self._at_the_end = threading.Event()

    def run(self, items: Iterator[Item | Done], submit: Submit, *, bounded: bool) -> None:
        """Bring every item to its row. On an interruption what is under way is finished, and nothing more is sent.

        Args:
            submit: starts a lane's task run.
            bounded: `items` come to an end, so that after an interruption the rest is listed as skipped.

        Raises:
            BaseException: what interrupted the batch, or the source's error, once all rows are recorded.
        """
        source = Source(items, self._events, self._stop, bounded=bounded)
        try:
            to_the_end(
                lambda: self._to_the_end(source, submit),
                self._stop,
                of="not sent, because the batch",
                grace=self._plan.options.grace,
                told=None,  # the loop does, and knows how much is under way
            )
        finally:  # where a second interruption waited no longer, each item has its row all the same
            self._events.put(_Leave())
            self._at_the_end.wait(_LAST_ROWS)

    def _to_the_end(self, source: Source, submit: Submit) -> None:
        source.start()
        error = None
        try:
            error = self._loop(source, submit)
        except BaseException as broken:
            self._stop_because(broken)
            self._loop(source, submit)
            raise
        finally:
            self._at_the_end.set()
        if error := error or self._signal:
            raise error

    def _loop(self, source: Source, submit: Submit) -> BaseException | None:
        """Work until there is nothing left to do or to wait for; return the error of the source, if it broke."""
        dispatch, broken, leave_at = self._dispatch, None, None
        while True:
            self._submit_lanes(submit)
            source.taken(dispatch.at_hand)
            if self._stop.reason and not self._told_elsewhere and dispatch.open_elsewhere:
                self._told_elsewhere = True
                tell = partial(copy_context().run, tell_elsewhere, self._ledger.store, self._plan, self._stop)
                threading.Thread(target=tell, name="ttapi-stop", daemon=True).start()
            if dispatch.finished or (source.unwanted and not dispatch.open_lanes):
                return broken
            now = time.monotonic()
            if self._stop.cancelled and not self._left:
                if leave_at is None:
                    leave_at = now + self._plan.options.grace
                    what = "%d requests under way have %.0f s to be finished and recorded"
                    grace = self._plan.options.grace
                    run_log().warning(f"Interrupted: nothing more is sent; {what}", dispatch.in_flight, grace)
                if now >= leave_at:
                    self._leave()
                    continue
            wait = dispatch.wait(now)
            try:
                event = self._events.get(timeout=_POLL if wait is None else min(wait, _POLL))
            except queue.Empty:
                continue
            match event:
                case Came(item):
                    source.told()
                    dispatch.came(item)
                case Ended(error):
                    dispatch.source_ended()
                    if error is not None:
                        self._stop_because(error)
                        broken = error
                case _Returned(lane, future):
                    self._returned(lane, future)
                case _Leave() if not self._left:
                    self._leave()

    def _submit_lanes(self, submit: Submit) -> None:
        dispatch = self._dispatch
        while (lane := dispatch.next_lane(time.monotonic())) is not None:
            self._begun[lane] = time.monotonic()
            try:
                future = submit(lane)
            except BaseException:
                dispatch.withdraw(lane)
                raise
            future.add_done_callback(partial(self._tell, lane))
        while dispatch.to_look_up:
            item = dispatch.to_look_up.popleft()
            dispatch.looked_up(item, recorded=self._is_recorded(item))
        self._take_rows()

    def _became(self, lost: Lost) -> Done:
        """Return the row of a request whose task runs broke down, by what they left in the ledger."""
        item, unsent = lost.item, lost.unsent
        name, origin = item.request.request_hash, self._ledger.api_origin
        why = lost.why or "what it has left in the ledger is all that is known"
        try:
            record = self._ledger.look_up(name, self._plan.not_before)
            if record is None:
                return lost_item(item, origin, why) if self._ledger.sent(name) else unsent
        except StoreError as error:
            return lost_item(item, origin, str(error))
        paid = of_this_batch(Paid(record, sent=False), *item.lost_in)
        row = row_of_paid(item, paid)
        if self._plan.options.deliver_to is not None:
            row = failed(
                row, LaneLostError(f"paid for, and not delivered, as its task run broke down: {why}")
            )
        return Done(row, images_paid=len(paid.generation.images) if paid.sent else 0)

    def _tell(self, lane: Lane, future: PrefectFuture[Any] | Future[Any]) -> None:
        self._events.put(_Returned(lane, future))

    def _take_rows(self) -> None:
        while self._dispatch.lost_for_good:
            lost = self._dispatch.lost_for_good.popleft()
            self._dispatch.found(lost.item, self._became(lost))
        while self._dispatch.rows:
            self._record(self._dispatch.rows.popleft())

    def _is_recorded(self, item: Item) -> bool:
        """Return whether the item costs nothing; where the store doesn't say, its lane meets the store's error."""
        try:
            return self._ledger.look_up(item.request.request_hash, self._plan.not_before) is not None
        except StoreError:
            return True

    def _returned(self, lane: Lane, future: PrefectFuture[Any] | Future[Any]) -> None:
        seconds = time.monotonic() - self._begun.pop(lane)
        try:
            found = _result(future)
        except Exception as error:  # its process died
            found = error
        except BaseException as signal:  # the run is suspended, or its process was interrupted
            self._stop_because(signal)
            self._signal = self._signal or signal
            found = signal
        if isinstance(found, list):
            self._dispatch.returned(lane, found, seconds)
        else:
            why = line_of(str(found.message if isinstance(found, State) else found))
            task_run_id = str(future.task_run_id) if isinstance(future, PrefectFuture) else ""
            if lane.elsewhere:
                run_log().warning(
                    "A task run with %s broke down: %s", counted(len(lane.items), "request"), why
                )
            self._dispatch.lost(lane, why, task_run_id)

    def _leave(self) -> None:
        """Write down what is known of the items that nobody waits for any longer."""
        others: list[_Event] = []
        with suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                if isinstance(event, _Returned):
                    self._returned(event.lane, event.future)
                else:
                    others.append(event)
        for event in others:
            self._events.put(event)
        self._left = True
        self._dispatch.leave()
        self._take_rows()
        self._shared.left.set()

    def _stop_because(self, broken: BaseException) -> None:
        what = format_exception_only(broken)[-1].strip()
        self._stop.set(f"not sent, because the batch was interrupted: {what}", type(broken).__name__)


def _result(future: PrefectFuture[Any] | Future[Any]) -> Any:
    """Return what a lane returned, or the error or state in which its task run broke down."""
    if isinstance(future, PrefectFuture):
        return future.result(raise_on_failure=False)
    state: State[Any] = future.result()
    return state.result(raise_on_failure=False)


@contextmanager
def lanes(credentials: TTAPICredentials, store: ImageStore, plan: Plan, most: int) -> Iterator[Submit]:
    """Yield what starts a lane's task run: on the flow's task runner, or inside a task in threads of its own.

    Tasks that wait for others in one pool may fill it.
    """
    runner = flow_task_runner()
    if isinstance(runner, ProcessPoolTaskRunner):
        with _Pools(runner) as pools:
            common = {"credentials": credentials, "store": store, "plan": plan}
            yield lambda lane: pools.submit({"lane": lane, **common})
        return
    if runner is not None:
        with _asked_of_ray(runner):
            yield lambda lane: generate_lane.submit(lane, credentials, store, plan)
        return
    with ThreadPoolExecutor(most, thread_name_prefix="ttapi-lanes") as threads:

        def state_of(lane: Lane) -> State[Any]:
            return generate_lane(lane, credentials, store, plan, return_state=True)

        yield lambda lane: threads.submit(copy_context().run, state_of, lane)


class _Pools(ExitStack):
    """The flow's pool of processes, and one like it in its place once a process of it dies: no pool survives that."""

    def __init__(self, runner: ProcessPoolTaskRunner) -> None:
        super().__init__()
        self._runner = runner
        self._broken: set[int] = set()

    def submit(self, parameters: dict[str, Any]) -> PrefectFuture[Any]:
        """Start a lane's task run."""
        if id(self._runner) in self._broken:
            self._runner = self.enter_context(self._runner.duplicate())
        runner = self._runner
        future = runner.submit(generate_lane, parameters)
        future.add_done_callback(partial(self._look, runner))
        return future

    def _look(self, runner: ProcessPoolTaskRunner, future: PrefectFuture[Any]) -> None:
        try:
            future.result(raise_on_failure=False)
        except BrokenExecutor:
            self._broken.add(id(runner))
        except BaseException as error:  # the lane's, who is told as well
            logger.debug("A task run broke down: %s", error)


@contextmanager
def _asked_of_ray(runner: object) -> Iterator[None]:
    """Ask Ray for what a lane needs, unless the user asks for something else; other engines are not asked.

    It waits more than it works, which takes no whole CPU. Lanes are spread over the nodes, so that one that dies takes
    few along. Ray does not repeat a lane by itself, as nobody would hear of what it lost.
    """
    if not type(runner).__module__.startswith("prefect_ray."):
        yield
        return
    context = import_module("prefect_ray.context")
    ours = {"num_cpus": 0.1, "scheduling_strategy": "SPREAD", "max_retries": 0}
    with context.remote_options(**ours | context.RemoteOptionsContext.get().current_remote_options):
        yield


def slots() -> int | None:
    """Return how many task runs the flow's task runner has room for at least, where that is known."""
    if not isinstance(flow_task_runner(), ProcessPoolTaskRunner):
        return None
    setting = get_current_settings().tasks.runner.process_pool_max_workers
    return setting or multiprocessing.cpu_count()


def flow_task_runner() -> object | None:
    """Return the task runner of the flow that this is called in; None inside a task."""
    flow_run = FlowRunContext.get()
    return flow_run.task_runner if flow_run and TaskRunContext.get() is None else None


def is_local() -> bool:
    """Return whether lanes run in threads of this process."""
    runner = flow_task_runner()
    return runner is None or isinstance(runner, ThreadPoolTaskRunner)
