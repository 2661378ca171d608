"""Generate a batch, and check or estimate it before it is sent."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial, wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from prefect import flow
from prefect.context import FlowRunContext, TaskRunContext

from prefect_ttapi.batch.dispatch import Dispatch
from prefect_ttapi.batch.items import Done, Intake, KeyCheck, Values, take_in
from prefect_ttapi.batch.known import sort_out
from prefect_ttapi.batch.lanes import Shared
from prefect_ttapi.batch.loop import Running, TaskRuns, is_local, slots
from prefect_ttapi.batch.options import BatchOptions, Breaker, Plan, Sizing
from prefect_ttapi.batch.recording import Recorder, folder_of_batch
from prefect_ttapi.capabilities import Model, nearest
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import IllegalBatchError, KeyTakenError
from prefect_ttapi.generation.budget import Budget, Price, Spending
from prefect_ttapi.generation.engine import ledger_for
from prefect_ttapi.generation.files import Provenance
from prefect_ttapi.generation.limits import Limits, RateLimit
from prefect_ttapi.generation.rescue import RescueFolder, rescue_place
from prefect_ttapi.generation.runs import (
    GRACE,
    RunContext,
    async_twin,
    must_outlive_the_run,
    run_log,
    stop_of_caller,
    to_the_end,
)
from prefect_ttapi.generation.temporary_server import start_server
from prefect_ttapi.images.renditions import Rendition
from prefect_ttapi.lineage.publishing import batch_completed, materialise_batch
from prefect_ttapi.lineage.report import BatchReport
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import Usage
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.store import ImageStore

P = ParamSpec("P")
R = TypeVar("R")
Requests = Iterable[ImageRequest | Mapping[str, Any] | str]


def _telling_the_nearest(call: Callable[P, R]) -> Callable[P, R]:
    """Let a misspelt keyword be told the nearest one, as Python does from 3.13 on."""
    legal = signature(call).parameters

    @wraps(call)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        for name in options.keys() - legal:
            raise TypeError(f"{name} is no option of {call.__name__}: {nearest(name, legal)}")
        return call(*args, **options)

    return checked


@_telling_the_nearest
def generate_batch(
    requests: Requests,
    credentials: TTAPICredentials,
    store: ImageStore,
    deliver_to: ImageStore | None = None,
    key: str = DEFAULT_KEY,
    values: Values = None,
    max_in_flight: int = 8,
    shard_size: int | None = None,
    budget: Budget | None = None,
    raise_on_failure: bool = True,
    name: str = "batch",
    *,
    refresh_cache: bool | None = None,
    cache_expiration: timedelta | None = None,
    breaker: int | None = 10,
    max_refused: int | None = 50,
    rate_limit: float | None = None,
    grace: float = GRACE,
    thumbnails: bool = True,
    renditions: Sequence[Rendition | Mapping[str, Any]] = (),
    keep_original: bool = True,
    overwrite: bool = False,
    provenance: Provenance | Mapping[str, Any] | None = None,
    record_prompts: bool = True,
) -> BatchReport:
    """Generate and deliver every request; each ends as a row of the report, and one bad prompt costs one row.

    Call it inside any flow, whose task runs and artifacts it then makes; outside of one, it opens a flow run of its
    own. The manifest is written to `batches/<flow run>/manifest.jsonl` in `store`, and a gallery page beside it. The
    second batch of a run has `batches/<flow run>/2/`, and so on; a batch in one of the flow's tasks has
    `batches/<flow run>/<task run>/`.

    Args:
        requests: requests, mappings of their fields, or prompts for the default model. A sequence is checked as a whole
            before anything is paid for. Any other iterable is read as room comes up, in a thread of the batch, and an
            illegal item in it is a failed row. It should come to an end: once nothing more may be sent, the rest of it
            is listed as skipped.
        credentials: the API key, and how patient to be.
        store: where the images and the ledger are.
        deliver_to: where copies go, under keys that the template `key` makes. None delivers nothing.
        key: a template over `name slug hash index ext model size date batch rendition` and the names in `values`.
        values: a mapping for each request, in order, or a function of the request.
        max_in_flight: how many requests are under way at once, as far as the flow's task runner has room for their
            task runs: `ThreadPoolTaskRunner(max_workers=2)` needs a `shard_size` that keeps both workers busy.
        shard_size: requests for each task run. By default it is 1 for up to 300 requests; beyond that a task run gets
            some 15 s of work.
        budget: limits of this batch; what does not fit ends as a skipped row.
        raise_on_failure: raise `BatchError` at the end, after everything else is delivered and recorded. What the
            budget left over is no failure: a warning says how much it is.
        name: names the batch in artifacts, pages and key templates.
        refresh_cache: pay anew for what was paid for before this run. By default Prefect's setting decides.
        cache_expiration: pay anew for what was paid for longer ago than this.
        breaker: this many failures of one kind in a row stop the batch; refused prompts don't count. None: never.
        max_refused: this many refused prompts in a row, while none passes, stop the batch, because accounts are closed
            for that. None: never.
        rate_limit: requests per minute at most.
        grace: after a cancellation, SIGTERM or Ctrl-C, seconds for what is under way to be finished and recorded before
            the manifest is written without it.
        thumbnails: show small pictures in the gallery and the artifact; each takes about 10 ms of CPU.
        renditions: smaller or lighter versions to deliver beside each image.
        keep_original: deliver the image itself, too.
        overwrite: replace other objects at the delivered keys; otherwise a request whose key is taken is not sent, and
            its row is failed.
        provenance: mark copies of images that don't say themselves that a model made them, e.g. `Provenance()`, and
            sign all files, e.g. `Provenance(sign=ContentCredentialsSigner.load("shop"))`. By default, copies are the
            images byte for byte, and renditions are marked, see `Rendition`.
        record_prompts: False keeps prompts out of everything that is shown (artifacts, pages, logs, events, metadata of
            delivered objects, keys). The manifest and the ledger in the store have them in either case.

    Raises:
        IllegalBatchError: requests, keys or arguments are illegal; nothing was sent.
        StoreError: a store can't be reached or written; nothing was sent.
        SigningError: files are to be signed, and can't be; nothing was sent.
        BatchError: rows failed, or were skipped for another reason than the budget, and `raise_on_failure` is on; its
            `report` has them.
    """
    options = BatchOptions(
        deliver_to=deliver_to,
        key=key,
        max_in_flight=max_in_flight,
        shard_size=shard_size,
        budget=budget,
        name=name,
        refresh_cache=refresh_cache,
        cache_expiration=cache_expiration,
        breaker=breaker,
        max_refused=max_refused,
        rate_limit=rate_limit,
        grace=grace,
        thumbnails=thumbnails,
        renditions=renditions,
        keep_original=keep_original,
        overwrite=overwrite,
        provenance=provenance,
        record_prompts=record_prompts,
    )
    intake = _checked(requests, values, credentials, store, options)
    # asked outside the flow run of our own that each retry of the task makes anew
    caller = RunContext.current().run_id if TaskRunContext.get() else None
    work = partial(_run, intake, credentials, store, options, caller)
    report = work() if FlowRunContext.get() else _in_own_flow(work, name)
    if raise_on_failure:
        report.raise_for_failures()
    return report


agenerate_batch = async_twin(generate_batch, of="not sent, because the batch")


def check_batch(
    requests: Requests,
    credentials: TTAPICredentials,
    store: ImageStore,
    *,
    values: Values = None,
    **options: Any,
) -> Intake:
    """Find all that can be found wrong with a batch before it is sent, and return its items.

    Args:
        options: those of `generate_batch`.

    Raises:
        IllegalBatchError: illegal requests, keys or arguments.
        StoreError: a store can't be reached or written.
        SigningError: files are to be signed, and can't be.
    """
    return _checked(requests, values, credentials, store, BatchOptions(**options))


def _checked(
    requests: Requests,
    values: Values,
    credentials: TTAPICredentials,
    store: ImageStore,
    options: BatchOptions,
) -> Intake:
    options.check()
    kinds: tuple[tuple[object, type], ...] = ((credentials, TTAPICredentials), (store, ImageStore))
    for argument, kind in kinds:
        if not isinstance(argument, kind):
            raise IllegalBatchError([f"{kind.__name__} is needed, not {type(argument).__name__}"])
    delivery = options.delivery(datetime.now(UTC))
    keys = KeyCheck(delivery, options.shown) if delivery else None
    intake = take_in(requests, values, keys, options.budget)
    must_outlive_the_run(store, options.deliver_to, rescue_place(store.rescue_folder))
    with store.before_paying(stop_of_caller()):
        store.check()
        if delivery is not None:
            delivery.check()
    return intake


@dataclass(frozen=True)
class Estimate:
    """The work that a batch would do.

    Attributes:
        requests: in all.
        paid: of them, those already paid for.
        to_send: those to send.
        images: that these ask for.
        images_by_model: the same by model.
        refused: those that are not sent, as something else is at the keys of their images.
    """

    requests: int
    paid: int
    to_send: int
    images: int
    images_by_model: Mapping[Model, int] = field(default_factory=dict)
    refused: int = 0

    def __str__(self) -> str:
        refused = f", {self.refused:,} not to be sent, as their keys are taken" if self.refused else ""
        return (
            f"{counted(self.requests, 'request')}: {self.paid:,} already paid for, "
            f"{counted(self.requests - self.paid - self.to_send - self.refused, 'duplicate')}, "
            f"{self.to_send:,} to send for {counted(self.images, 'image')}{refused}"
        )

    def usd(self, prices: Mapping[Model, Price]) -> float | None:
        """Return what the images cost; None without a price per image for each of their models.

        >>> Estimate(3, 1, 2, 4, {"dall-e-3": 4}).usd({"dall-e-3": Price(per_image=0.04)})
        0.16
        """
        known = {model: prices.get(model, Price()) for model in self.images_by_model}
        if not all(price.per_image for price in known.values()):
            return None
        return float(
            sum(known[model].exactly(count, Usage()) for model, count in self.images_by_model.items())
        )


def estimate_batch(
    intake: Intake, credentials: TTAPICredentials, store: ImageStore, name: str = "batch", **options: Any
) -> Estimate:
    """Ask the ledger about each distinct request of a checked batch; nothing is sent to the API.

    Args:
        intake: what `check_batch` gave.
        credentials, store, name: as in `generate_batch`.
        options: the others of `generate_batch`.
    """
    ledger = ledger_for(credentials, store, uuid.uuid4().hex)
    plan = Plan("", RunContext.current(), BatchOptions(**options | {"name": name, "thumbnails": False}))
    requests = paid = refused = 0
    to_send: set[str] = set()
    images: Counter[Model] = Counter()
    for found in sort_out(intake, ledger, plan, Stop()):
        requests += 1
        if isinstance(found, Done):
            paid += found.row.status == "cached"
            refused += found.row.error_type == KeyTakenError.__name__
        elif found.request.request_hash not in to_send:
            record = None if found.known_absent else ledger.look_up(found.request.request_hash)
            paid += record is not None
            if record is None:
                to_send.add(found.request.request_hash)
                images[found.request.model] += found.request.n
    return Estimate(requests, paid, len(to_send), images.total(), images, refused)


def _run(
    intake: Intake,
    credentials: TTAPICredentials,
    store: ImageStore,
    options: BatchOptions,
    payer: str | None,
) -> BatchReport:
    """Run a checked batch, inside a flow run, which pays if no other payer is given."""
    run = RunContext.current()
    run = replace(run, run_id=payer or run.run_id)
    not_before = run.not_before(options.refresh_cache, options.cache_expiration)
    folder = folder_of_batch(run.place, run.attempt)
    plan = Plan(uuid.uuid4().hex, run, options, not_before, folder)
    stop = stop_of_caller() or Stop()
    limits = Limits(
        stop,
        in_flight=options.max_in_flight,
        rate=RateLimit(options.rate_limit) if options.rate_limit else None,
        spending=Spending(options.budget),
    )
    shared = Shared(limits, Breaker(options.breaker, options.max_refused))
    sizing = Sizing.of(options, intake.total, local=is_local(), slots=slots())
    ledger = ledger_for(credentials, store, run.run_id)
    dispatch = Dispatch(sizing, shared, ledger.api_origin, options)
    recorder = Recorder(store, plan, ledger.api_origin, intake.total, dispatch)
    with recorder, TaskRuns(credentials, store, plan, shared, sizing.most) as task_runs:
        running = Running(dispatch, ledger, plan, recorder, task_runs)
        whole = False

        def write_down() -> BatchReport:
            rescued = RescueFolder(store, ledger.api_origin, run_log()).waiting()
            report = recorder.finish(limits.spending.notes(), rescued)
            batch_completed(report, interrupted=stop.cancelled or not whole)
            return report

        try:
            running.run(sort_out(intake, ledger, plan, stop), bounded=intake.total is not None)
            whole = True
        finally:
            # not even a first Ctrl-C is to cost the manifest; a second one does not wait for it
            report = to_the_end(
                write_down,
                stop,
                of="not sent, because the batch",
                grace=0 if stop.cancelled else options.grace,
                told="%.0f s to write the manifest",
            )
            recorder.remember(report)
    if report.left_over:
        left = counted(report.left_over, "request")
        run_log().warning(
            f"The budget left over {left} of {report.totals.rows:,}: run the batch again with another"
        )
    return materialise_batch(report)


def _in_own_flow(work: Callable[[], BatchReport], name: str) -> BatchReport:
    """Run `work` as a flow without parameters: the server would store them, prompts and all."""
    start_server()
    named = name.replace("{", "{{").replace("}", "}}")  # Prefect takes it for a template

    # no retries, whatever Prefect's setting for all flows says: the requests may be read only once
    @flow(name="generate-batch", flow_run_name=named, retries=0, persist_result=False)
    def own() -> BatchReport:
        return work()

    return own()
