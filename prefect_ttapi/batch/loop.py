"""Read requests, start lanes' task runs on the flow's task runner as room comes up, and record each request's row."""

from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Final, cast

from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture
from prefect.settings import get_current_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from prefect_ttapi.batch.dispatch import Dispatch, Lost
from prefect_ttapi.batch.items import Done, Item, failed, of_this_batch, row_of_paid
from prefect_ttapi.batch.items import lost as lost_item
from prefect_ttapi.batch.lanes import Lane, Shared, generate_lane, shared_here, tell_elsewhere
from prefect_ttapi.batch.options import Plan
from prefect_ttapi.batch.recording import Recorder
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import LaneLostError, StoreError
from prefect_ttapi.generation.persisting import Paid
from prefect_ttapi.generation.runs import run_log, to_the_end, why_interrupted
from prefect_ttapi.ledger.documents import line_of
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.stopping import Stop, StopSending
from prefect_ttapi.storage.objects import NoAnswerError
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Seconds for writing down rows when nobody waits any longer.
_LAST_ROWS: Final = 2.0

#: Seconds between looks whether the batch was cancelled.
_POLL: Final = 0.1

#: How many items may be read from the source that nobody has taken yet.
_AHEAD: Final = 16

#: Seconds for which a store that did not tell what became of a lost request is not asked about others.
_SILENCE: Final = 60.0


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
        ledger: says what lost task runs have left.
        plan: of the batch.
        recorder: is given each row, in one thread.
        task_runs: starts a lane's task run.
    """

    def __init__(
        self, dispatch: Dispatch, ledger: Ledger, plan: Plan, recorder: Recorder, task_runs: TaskRuns
    ) -> None:
        self._dispatch = dispatch
        self._stop = dispatch.stop
        self._ledger = ledger
        self._plan = plan
        self._recorder = recorder
        self._task_runs = task_runs
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._begun: dict[Lane, float] = {}
        self._error: BaseException | None = None  # the first that interrupted the batch
        self._left = self._told_elsewhere = False
        self._at_the_end = threading.Event()
        self._silent_until, self._silence = 0.0, ""  # of the store, about lost requests

    def run(self, items: Iterator[Item | Done], *, bounded: bool) -> None:
        """Bring every item to its row. On an interruption what is under way is finished, and nothing more is sent.

        Args:
            bounded: `items` come to an end, so that after an interruption the rest is listed as skipped.

        Raises:
            BaseException: what interrupted the batch, or the source's error, once all rows are recorded.
        """
        self._source = Source(items, self._events, self._stop, bounded=bounded)
        try:
            to_the_end(
                self._to_the_end,
                self._stop,
                of="not sent, because the batch",
                grace=self._plan.options.grace,
                told=None,  # the loop does, and knows how much is under way
            )
        finally:  # where a second interruption waited no longer, each item has its row all the same
            self._events.put(_Leave())
            self._at_the_end.wait(_LAST_ROWS)

    def _to_the_end(self) -> None:
        self._source.start()
        try:
            self._loop()
        except BaseException as error:
            self._interrupted_by(error)
            self._loop()
        finally:
            self._at_the_end.set()
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        """Work until there is nothing left to do or to wait for."""
        dispatch, source, grace = self._dispatch, self._source, self._plan.options.grace
        leave_at = None
        while True:
            self._submit_lanes()
            source.taken(dispatch.at_hand)
            if self._stop.reason and not self._told_elsewhere:
                self._tell_elsewhere()
            if dispatch.finished:
                return
            if source.unwanted and not dispatch.open_lanes and self._events.empty():
                return  # the source may hang; what it gave before has its rows
            now = time.monotonic()
            if self._stop.cancelled and not self._left:
                if leave_at is None:
                    leave_at = now + grace
                    what = "%d requests under way have %.0f s to be finished and recorded"
                    run_log().warning(f"Interrupted: nothing more is sent; {what}", dispatch.in_flight, grace)
                if now >= leave_at:
                    self._leave()
                    continue
            wait = dispatch.wait(now)
            try:
                event = self._events.get(timeout=_POLL if wait is None else min(wait, _POLL))
            except queue.Empty:
                continue
            self._take(event)

    def _take(self, event: _Event) -> None:
        match event:
            case Came(item):
                self._source.told()
                self._dispatch.came(item)
            case Ended(error):
                self._dispatch.source_ended()
                if error is not None:
                    self._interrupted_by(error)
            case _Returned(lane, future):
                self._returned(lane, future)
            case _Leave():
                self._leave()

    def _submit_lanes(self) -> None:
        dispatch = self._dispatch
        while (lane := dispatch.next_lane(time.monotonic())) is not None:
            self._begun[lane] = time.monotonic()
            try:
                future = self._task_runs.submit(lane)
            except BaseException:
                dispatch.withdraw(lane)
                raise
            future.add_done_callback(partial(self._tell, lane))
        self._take_rows()

    def _tell(self, lane: Lane, future: PrefectFuture[Any] | Future[Any]) -> None:
        self._events.put(_Returned(lane, future))

    def _tell_elsewhere(self) -> None:
        """Let lanes in other processes hear of the stop."""
        if self._dispatch.open_lanes and not self._dispatch.sizing.local:
            self._told_elsewhere = True
            tell = partial(copy_context().run, tell_elsewhere, self._ledger.store, self._plan, self._stop)
            threading.Thread(target=tell, name="ttapi-stop", daemon=True).start()

    def _take_rows(self) -> None:
        while self._dispatch.lost_for_good:
            lost = self._dispatch.lost_for_good.popleft()
            self._dispatch.found(lost.item, self._became(lost))
        while self._dispatch.rows:
            self._recorder.add(self._dispatch.rows.popleft())

    def _became(self, lost: Lost) -> Done:
        """Return the row of a request whose task runs broke down, by what they left in the ledger.

        Where the store does not tell, the request may be paid for. A store that gives no answer would be waited for
        with each of many requests, so that it is asked about the next ones only after a while.
        """
        item, name, origin = lost.item, lost.item.request.request_hash, self._ledger.api_origin
        why = lost.why or "what it has left in the ledger is all that is known"
        if time.monotonic() < self._silent_until:
            return lost_item(item, origin, self._silence)
        try:
            with self._ledger.store.before_paying(self._stop):
                record = self._ledger.look_up(name, self._plan.not_before)
                if record is None:
                    return lost_item(item, origin, why) if self._ledger.sent(name) else lost.unsent
        except (NoAnswerError, StopSending) as error:
            said = error if isinstance(error, NoAnswerError) else "the store gave no answer in time"
            self._silent_until = time.monotonic() + _SILENCE
            self._silence = f"what it has left in the ledger can't be told: {said}"
            return lost_item(item, origin, self._silence)
        except StoreError as error:
            return lost_item(item, origin, str(error))
        paid = of_this_batch(Paid(record, sent=False), *item.lost_in)
        row = row_of_paid(item, paid)
        if self._plan.options.deliver_to is not None:
            row = failed(
                row, LaneLostError(f"paid for, and not delivered, as its task run broke down: {why}")
            )
        return Done(row, images_paid=len(paid.generation.images) if paid.sent else 0)

    def _returned(self, lane: Lane, future: PrefectFuture[Any] | Future[Any]) -> None:
        seconds = time.monotonic() - self._begun.pop(lane)
        try:
            found = _result(future)
        except Exception as error:  # its process died
            found = error
        except BaseException as signal:  # the run is suspended, or its process was interrupted
            self._interrupted_by(signal)
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
        if self._left:
            return
        self._left = True
        for _ in range(self._events.qsize()):  # what has come back by now is known
            self._take(self._events.get())
        self._dispatch.leave()
        self._take_rows()

    def _interrupted_by(self, error: BaseException) -> None:
        self._stop.set(*why_interrupted("not sent, because the batch", error))
        self._error = self._error or error


def _result(future: PrefectFuture[Any] | Future[Any]) -> Any:
    """Return what a lane returned, or the error or state in which its task run broke down."""
    if isinstance(future, PrefectFuture):
        return future.result(raise_on_failure=False)
    state: State[Any] = future.result()
    return state.result(raise_on_failure=False)


class TaskRuns(ExitStack):
    """Starts lanes' task runs: on the flow's task runner, or inside a task in threads of its own.

    Tasks that wait for others in one pool may fill it. No pool of processes survives the death of one of them: another
    one like it takes its place.

    Args:
        shared: what the lanes in this process share.
        most: lanes that are open at once, at most.
    """

    def __init__(
        self, credentials: TTAPICredentials, store: ImageStore, plan: Plan, shared: Shared, most: int
    ) -> None:
        super().__init__()
        self._common = {"credentials": credentials, "store": store, "plan": plan}
        self._runner = runner = flow_task_runner()
        self._broken: set[int] = set()
        self.enter_context(shared_here(shared, plan.batch_id))
        if runner is None:
            self._threads = self.enter_context(ThreadPoolExecutor(most, thread_name_prefix="ttapi-lanes"))
        elif type(runner).__module__.startswith("prefect_ray."):
            self.enter_context(_asked_of_ray())

    def submit(self, lane: Lane) -> PrefectFuture[Any] | Future[Any]:
        """Start a lane's task run."""
        parameters: dict[str, Any] = {"lane": lane, **self._common}
        if not lane.elsewhere:
            # quoted, Prefect does not look for futures in each prompt and option; quotes can't be pickled
            parameters = {name: quote(value) for name, value in parameters.items()}
        runner = self._runner
        if runner is None:
            lane_run = partial(generate_lane, **parameters, return_state=True)
            return self._threads.submit(copy_context().run, lane_run)
        if not isinstance(runner, ProcessPoolTaskRunner):
            future: PrefectFuture[Any] = generate_lane.submit(**parameters)
            return future
        if id(runner) in self._broken:
            self._runner = runner = self.enter_context(runner.duplicate())
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


def _asked_of_ray() -> AbstractContextManager[None]:
    """Ask Ray for what a lane needs, unless the user asks for something else.

    It waits more than it works, which takes no whole CPU. Lanes are spread over the nodes, so that one that dies takes
    few along. Ray does not repeat a lane by itself, as nobody would hear of what it lost.
    """
    context = import_module("prefect_ray.context")
    ours = {"num_cpus": 0.1, "scheduling_strategy": "SPREAD", "max_retries": 0}
    theirs = context.RemoteOptionsContext.get().current_remote_options
    return cast(AbstractContextManager[None], context.remote_options(**ours | theirs))


def slots() -> int | None:
    """Return how many task runs the flow's task runner has room for at least, where that is known."""
    if not isinstance(flow_task_runner(), ProcessPoolTaskRunner):
        return None
    setting = get_current_settings().tasks.runner.process_pool_max_workers
    return setting or multiprocessing.cpu_count()


def flow_task_runner() -> TaskRunner[Any] | None:
    """Return the task runner of the flow that this is called in; None inside a task."""
    flow_run = FlowRunContext.get()
    return flow_run.task_runner if flow_run and TaskRunContext.get() is None else None


def is_local() -> bool:
    """Return whether lanes run in threads of this process."""
    runner = flow_task_runner()
    return runner is None or isinstance(runner, ThreadPoolTaskRunner)
