"""Publish artifacts on the current run; one that fails is a warning, since the images were paid for before.

Outside any run nothing is published: Prefect's artifacts belong to runs. Every function blocks for about
20 ms and finds its run in the calling thread's context, in sync and async flows alike.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Final
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext, TaskRunContext, get_run_context
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from prefect_ttapi.capabilities import RULES
from prefect_ttapi.images.renditions import GALLERY_BOX, as_data_uri, thumbnail_or_none
from prefect_ttapi.lineage.markdown import CAPTION, REASON, cell, inert, one_line
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import PartialImage

#: Seconds between two updates of a progress artifact, and after one that failed: Prefect's client tries for a
#: minute, and whoever waits for it here is a worker that should generate images.
EVERY: Final = 2.0
AFTER_FAILURE: Final = 60.0


def batch_key(name: str, kind: str = "") -> str:
    """Return the key of a batch's artifact: runs of the same batch are versions of it.

    >>> batch_key("Autumn campaign", "images"), batch_key("秋")
    ('ttapi-autumn-campaign-60278b25-images', 'ttapi-batch-5a2e5e4b')
    >>> batch_key("autumn-campaign")
    'ttapi-autumn-campaign'
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "batch"
    # two names that read alike stay two
    lost = "" if slug == name else "-" + hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]
    return f"ttapi-{slug}{lost}" + (f"-{kind}" if kind else "")


def delivery_key(request_hash: str) -> str:
    """Return the key of a delivery's artifact: its versions are the history of that request.

    >>> delivery_key("3f9a12" + 58 * "0")
    'ttapi-3f9a120000000000000000000000000000000000000000000000000000000000'
    """
    return f"ttapi-{request_hash}"


def publish_markdown(key: str, markdown: str, description: str | None = None) -> UUID | None:
    """Publish a markdown artifact of the current run; return its id, or None if there is no run or it failed."""
    return _publish("markdown", key, markdown, description)


def publish_table(key: str, table: list[dict[str, object]], description: str | None = None) -> UUID | None:
    """Publish a table artifact of the current run; return its id, or None if there is no run or it failed."""
    return _publish("table", key, json.dumps(table), description)


def publish_link(key: str, link: str, text: str, description: str | None = None) -> UUID | None:
    """Publish a link artifact of the current run; return None also where `link` is no web address."""
    if not link.startswith(("http://", "https://")):
        return None
    return _publish("markdown", key, f"[{text}]({link})", description)


class Progress:
    """A progress artifact of the current run, updated at most every `every` seconds and at the end.

    Safe to call from any thread: a call while another one is publishing returns at once.

    Args:
        key: of the artifact.
        description: shown beside it; each update may say something newer.
        every: seconds between updates.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        key: str,
        description: str | None = None,
        *,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every = every
        self._clock = clock
        self._busy = threading.Lock()
        self._id = _publish("progress", key, 0.0, description)
        # an update may come from a thread that knows nothing of the run and its server
        self._context = copy_context()
        self._next = clock() + every

    def update(self, done: int, total: int | None, description: str | None = None) -> None:
        """Show `done` of `total`, unless the last update is too fresh or another thread is at it.

        Args:
            done: requests that are finished.
            total: how many there are, or None while nobody knows: then 0 % are shown.
            description: shown beside it from now on.
        """
        if self._id is None or self._clock() < self._next or not self._busy.acquire(blocking=False):
            return
        try:
            self._show(self._id, 100.0 * min(done / total, 1.0) if total else 0.0, description)
        finally:
            self._busy.release()

    def finish(self, description: str | None = None) -> None:
        """Show 100 %, whenever the last update was."""
        if self._id is not None:
            with self._busy:
                self._show(self._id, 100.0, description)

    def _show(self, artifact_id: UUID, percent: float, description: str | None) -> None:
        told = {"description": _told(description)} if description else {}
        update = ArtifactUpdate(data=percent, **told)
        shown = self._context.run(_sent, lambda client: client.update_artifact(artifact_id, update))
        self._next = self._clock() + (self._every if shown else AFTER_FAILURE)


def _publish(kind: str, key: str, data: str | float, description: str | None) -> UUID | None:
    try:
        get_run_context()
    except MissingContextError:
        return None
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    made: list[UUID] = []

    # Prefect's own functions give a coroutine that nobody awaits to the worker threads of async flows
    def create(client: SyncPrefectClient) -> None:
        artifact = ArtifactCreate(
            type=kind,
            key=key,
            data=data,
            description=_told(description),
            flow_run_id=flow.flow_run.id if flow and flow.flow_run else None,
            task_run_id=task.task_run.id if task else None,
        )
        made.append(client.create_artifact(artifact).id)

    return made[0] if _sent(create) else None


def _sent(send: Callable[[SyncPrefectClient], None]) -> bool:
    try:
        with get_client(sync_client=True) as client:
            send(client)
    except Exception as error:
        get_run_logger().warning(
            "An artifact was not published, images and manifest are not affected: %s: %s",
            type(error).__name__,
            error,
        )
        return False
    return True


def _told(description: str | None) -> str | None:
    """Return a description that reads the same in both of Prefect's UIs, of which both read Markdown there."""
    return description and cell(one_line(description, REASON))


#: Previews asked for where the request doesn't say; the vendor makes no more.
PARTIAL_IMAGES: Final = 3


def with_previews(request: ImageRequest) -> ImageRequest:
    """Return the request as a stream with previews; unchanged for models that can't stream.

    >>> with_previews(ImageRequest(prompt="a tree", model="gpt-image-1")).partial_images
    3
    """
    if "stream" not in RULES[request.model]:
        return request
    wanted = {"stream": True, "partial_images": request.partial_images or PARTIAL_IMAGES}
    return request.model_copy(update=wanted)


def publish_preview(request_hash: str, caption: str, preview: PartialImage) -> None:
    """Show `preview` in the run's artifact for this request; each is a new version of it."""
    publish_markdown(
        f"ttapi-preview-{request_hash}",
        preview_markdown(caption, preview),
        description=f"Request {request_hash[:12]} as it grows",
    )


def preview_markdown(caption: str, preview: PartialImage) -> str:
    """Return the artifact of one preview."""
    webp = thumbnail_or_none(partial(preview.spool.open), GALLERY_BOX)
    picture = f'<img width="{GALLERY_BOX}" src="{as_data_uri(webp)}">' if webp else "no picture"
    shown = f'<span dir="auto">{inert(one_line(caption, CAPTION))}</span>'
    return f"## Preview {preview.index + 1}\n\n<p>\n{picture}<br>\n{shown}\n</p>\n"
