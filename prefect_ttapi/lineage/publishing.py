"""Publish what the current run made: artifacts, assets and events.

| event | when | resource |
|---|---|---|
| `ttapi.image.delivered` | an image lies under the name its consumers know | the object's address |
| `ttapi.batch.completed` | a batch has its manifest, also where it was interrupted | the manifest's address |
| `ttapi.balance.exhausted` | the API refused for lack of money, told once per flow run | `ttapi.account.<host>` |

A delivered object is an asset of its own. A batch is one asset, its manifest: Prefect drops an event with more than
100 upstream assets, and that event would be the user's.

What fails here is a warning and never fails the run, since the images were paid for before. Outside any run nothing is
published. The run is found in the calling thread's context, in sync and async flows alike. An artifact takes about
20 ms; an event costs the caller 0.1 ms, this process 0.6 ms, and a server 2 ms of CPU.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, Final, Literal
from uuid import UUID

from prefect import get_client
from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.logging import get_run_logger
from pydantic import ValidationError

from prefect_ttapi.lineage.report import BatchReport
from prefect_ttapi.lineage.shown import REASON, Shown, cell, one_line
from prefect_ttapi.results import DeliveredImage, Generation
from prefect_ttapi.storage.keys import slug

#: Seconds between two updates of a progress artifact, and after one that failed: Prefect's client tries for a
#: minute, and whoever waits for it here is a worker that should generate images.
EVERY: Final = 2.0
AFTER_FAILURE: Final = 60.0


def batch_key(name: str, kind: str = "") -> str:
    """Return the key of a batch's artifact: runs of the same batch are versions of it.

    >>> batch_key("Autumn campaign", "images"), batch_key("秋")
    ('batch-autumn-campaign-60278b-images', 'batch-5a2e5e')
    >>> batch_key("autumn-campaign")
    'batch-autumn-campaign'
    """
    return "-".join(part for part in ("batch", _words(name), kind) if part)


def _words(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-")
    # two names that read alike stay two
    lost = "" if words == name else hashlib.sha256(name.encode(errors="replace")).hexdigest()[:6]
    return f"{words}-{lost}".strip("-")


def image_key(name: str, request_hash: str, kind: str = "image") -> str:
    """Return the key of a request's artifact; of very many in a flow run, one key that they share.

    A page that lists 300 artifacts of one run has no place for anybody else's. Each is on its task run in any case.

    Args:
        name: of the image, else its prompt.
        request_hash: of the request.
        kind: what the artifact shows.

    >>> image_key("A lighthouse at dusk", "3f9a12" + 58 * "0")
    'image-a-lighthouse-at-dusk-3f9a12'
    """
    flow = FlowRunContext.get()
    own = f"{kind}-{slug(name)}-{request_hash[:6]}"
    if not (flow and flow.flow_run):
        return own
    with _KEYS_LOCK:
        keys = _KEYS.setdefault((str(flow.flow_run.id), flow.flow_run.run_count), set())
        if own in keys or len(keys) < OWN_KEYS:
            keys.add(own)
            return own
    return f"{kind}s-{_words(flow.flow.name if flow.flow else '')}".strip("-")


def publish(
    kind: Literal["markdown", "table", "progress"],
    key: str,
    data: str | list[dict[str, object]] | float,
    description: str | None = None,
) -> UUID | None:
    """Publish an artifact of the current run; return its id, or None if there is no run or it failed."""
    if not _in_a_run():
        return None
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    # Prefect's own functions give a coroutine that nobody awaits to the worker threads of async flows
    with _harmless(_NO_ARTIFACT), get_client(sync_client=True) as client:
        artifact = ArtifactCreate(
            type=kind,
            key=key,
            data=json.dumps(data) if isinstance(data, list) else data,
            description=_told(description),
            flow_run_id=flow.flow_run.id if flow and flow.flow_run else None,
            task_run_id=task.task_run.id if task else None,
        )
        return client.create_artifact(artifact).id
    return None


#: Requests of a flow run whose artifacts have a key of their own, and which have one, in this process.
OWN_KEYS: Final = 5
_KEYS: Final[dict[tuple[str, int], set[str]]] = {}
_KEYS_LOCK: Final = threading.Lock()


class Progress:
    """A progress artifact of the current run, updated at most every `every` seconds and at the end.

    Safe to call from any thread: a call while another one is publishing returns at once.

    Args:
        key: of the artifact.
        description: shown beside it; each update may say something newer.
        every: seconds between updates.
    """

    def __init__(self, key: str, description: str | None = None, *, every: float = EVERY) -> None:
        self._every = every
        self._busy = threading.Lock()
        self._id = publish("progress", key, 0.0, description)
        # an update may come from a thread that knows nothing of the run and its server
        self._context = copy_context()
        self._next = time.monotonic() + every

    def update(self, done: int, total: int | None, description: str | None = None) -> None:
        """Show `done` of `total`, unless the last update is too fresh or another thread is at it.

        Args:
            done: requests that are finished.
            total: how many there are, or None while nobody knows: then 0 % are shown.
            description: shown beside it from now on.
        """
        if time.monotonic() >= self._next and self._busy.acquire(blocking=False):
            try:
                self._show(100.0 * min(done / total, 1.0) if total else 0.0, description)
            finally:
                self._busy.release()

    def finish(self, description: str | None = None) -> None:
        """Show 100 %, whenever the last update was."""
        with self._busy:
            self._show(100.0, description)

    def _show(self, percent: float, description: str | None) -> None:
        if self._id is not None:
            told = {"description": _told(description)} if description else {}
            shown = self._context.run(_updated, self._id, ArtifactUpdate(data=percent, **told))
            self._next = time.monotonic() + (self._every if shown else AFTER_FAILURE)


_NO_ARTIFACT: Final = "An artifact was not published, images and manifest are not affected"


def _updated(artifact_id: UUID, update: ArtifactUpdate) -> bool:
    with _harmless(_NO_ARTIFACT), get_client(sync_client=True) as client:
        client.update_artifact(artifact_id, update)
        return True
    return False


def _told(description: str | None) -> str | None:
    """Return a description that reads the same in both of Prefect's UIs, of which both read Markdown there."""
    return description and cell(one_line(description, REASON))


def _in_a_run() -> bool:
    return bool(FlowRunContext.get() or TaskRunContext.get())


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Let nothing that fails here fail the run, whose log says what it was."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("%s: %s: %s", what, type(error).__name__, error)


#: Who made an asset, in Prefect's words.
MADE_BY: Final = "prefect-ttapi"

#: Delivered objects of one flow run that its later tasks are linked to: a task that takes all of them still has
#: its own event, with a few places left for assets of the user's own.
TRACKED: Final = 90


def asset_at(uri: str, *, name: str | None = None, url: str | None = None) -> Asset | None:
    """Return the asset at `uri`, or None if Prefect takes no such key: over 512 characters, or with a `%` or the like.

    >>> asset_at("s3://bucket/shop/a.png"), asset_at("file:///srv/a%20b.png")
    (Asset(key='s3://bucket/shop/a.png'), None)
    """
    try:
        return Asset(key=uri, properties=AssetProperties(name=name or uri.rpartition("/")[2], url=url))
    except ValidationError:
        return None


def image_facts(generation: Generation, copy: DeliveredImage, shown: Shown) -> dict[str, Any]:
    """Return what is known of where a delivered image comes from, JSON-able, prompts cut to 1,000 characters."""
    image = shown.image(next(image for image in generation.images if image.uri == copy.source_uri))
    facts = copy.model_dump(mode="json", exclude={"uri", "signer", "etag"}) | {
        "request_hash": generation.request_hash,
        "model": generation.request.model,
        "api_origin": generation.api_origin,
        "request_id": generation.request_id,
        "paid_in_flow_run": generation.flow_run_id,
        "paid_in_task_run": generation.task_run_id,
        "prompt": one_line(shown.prompt(generation.request), PROMPT),
        "revised_prompt": image.revised_prompt and one_line(image.revised_prompt, PROMPT),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def materialise_images(generation: Generation, copies: Iterable[DeliveredImage], shown: Shown) -> None:
    """Make the running task the one that materialises `copies`; outside a task nothing happens."""
    facts = {
        found: image_facts(generation, copy, shown)
        for copy in copies
        if (found := asset_at(copy.uri, url=copy.url))
    }
    if facts and _in_a_run():
        # another Prefect may keep its assets elsewhere
        with _harmless("Delivered images are no assets of this run"):
            _declare(facts)


def _declare(facts: Mapping[Asset, dict[str, Any]]) -> None:
    """Tell Prefect what the running task materialises: a decorator can't, since keys are known only by now."""
    from prefect.context import AssetContext  # no public name: its absence must not break the package

    context = AssetContext.get()
    if context is None:
        return
    context.downstream_assets.update(facts)
    context.materialized_by = context.materialized_by or MADE_BY
    for made, metadata in facts.items():
        context.add_asset_metadata(made.key, metadata)
    flow = FlowRunContext.get()
    tracked: set[Asset] = set().union(*list(flow.task_run_assets.values())) if flow else set()
    if len(tracked) + len(facts) <= TRACKED:
        context.update_tracked_assets()


def materialise_batch(report: BatchReport) -> BatchReport:
    """Return `report` itself, as the result of a task run of the flow that materialises the batch's manifest.

    A `@materialize` task of the flow that is given this very object has the manifest upstream. Outside a run, and
    where Prefect takes no such key, there is no task run.
    """
    manifest = asset_at(report.manifest_uri, name=report.name)
    if manifest is None or FlowRunContext.get() is None:
        return report

    @materialize(manifest, by=MADE_BY, name="batch-manifest", cache_policy=NO_CACHE, persist_result=False)
    def record_manifest(report: BatchReport) -> BatchReport:
        add_asset_metadata(manifest, report.facts)
        get_run_logger().info(f"The batch's manifest: {manifest.key}")
        return report

    with _harmless("The manifest is no asset of this run"):
        return record_manifest(report)
    return report


#: Attempts at flow runs that told of each empty account already: 200 mapped tasks are to wake nobody 200 times.
_TOLD: Final[set[tuple[str, int, str]]] = set()

#: Seconds for the event of an interrupted batch: Prefect ends a process after SIGTERM without waiting for its events.
LAST_WORD: Final = 3.0

#: Characters of a prompt in an event; the whole one is in the ledger, under the request hash.
PROMPT: Final = 1_000


def images_delivered(generation: Generation, copies: Iterable[DeliveredImage], shown: Shown) -> None:
    """Tell of each delivered image, with what `image_facts` says of it."""
    for copy in copies:
        labels = {
            "prefect.resource.id": copy.uri,
            "prefect.resource.name": copy.uri.rpartition("/")[2],
            "ttapi.model": generation.request.model,
            "ttapi.request_hash": generation.request_hash,
        }
        _emit("ttapi.image.delivered", labels, image_facts(generation, copy, shown))


def batch_completed(report: BatchReport, *, interrupted: bool = False) -> None:
    """Tell of a batch's end; `ttapi.ok` tells an automation whether every row has its images.

    Args:
        interrupted: the batch was told to end; its process ends soon, and what is not on its way by then is lost.
    """
    labels = {
        "prefect.resource.id": report.manifest_uri,
        "prefect.resource.name": report.name,
        "ttapi.ok": str(report.ok).lower(),
        "ttapi.interrupted": str(interrupted).lower(),
    }
    _emit("ttapi.batch.completed", labels, report.facts)
    if interrupted and _in_a_run():
        sending = threading.Thread(target=copy_context().run, args=(_sent,), name="ttapi-events", daemon=True)
        sending.start()
        sending.join(LAST_WORD)


def balance_exhausted(api_origin: str, message: str) -> None:
    """Tell that the account is empty; the first time in an attempt at a flow run, and in this process.

    Args:
        api_origin: whose account it is, e.g. `https://api.ttapi.io`.
        message: what the API said.
    """
    flow = FlowRunContext.get()
    if flow and flow.flow_run:
        telling = (str(flow.flow_run.id), flow.flow_run.run_count, api_origin)
        if telling in _TOLD:
            return
        _TOLD.add(telling)
    host = api_origin.rpartition("://")[2]
    labels = {"prefect.resource.id": f"ttapi.account.{host}", "prefect.resource.name": f"TTAPI at {host}"}
    _emit("ttapi.balance.exhausted", labels, {"api_origin": api_origin, "message": message})


def _sent() -> None:
    """Wait until the server has the events so far."""
    with _harmless("Events may not have been sent"):
        EventsWorker.instance().wait_until_empty()


def _emit(event: str, resource: dict[str, str], payload: dict[str, Any]) -> None:
    if _in_a_run():  # outside any run, Prefect would start a server to hear of this
        with _harmless(f"The event {event} was not sent"):
            emit_event(event, resource=resource, payload=payload)
