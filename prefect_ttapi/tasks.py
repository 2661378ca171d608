"""The Prefect tasks: `generate_images`, `deliver_images`, and their async twins.

The sync tasks run in a flow, by `.submit`, by `.map` and outside any flow. The async twins run the same code in worker
threads of their own, so that an event loop is never blocked by an image.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, ParamSpec, TypeVar

from prefect import Flow, Task
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.context import TaskRunContext
from prefect.exceptions import SerializationError
from prefect.futures import PrefectDistributedFuture
from prefect.logging import get_run_logger
from prefect.serializers import JSONSerializer, prefect_json_object_encoder

from prefect_ttapi.api.redaction import withholding
from prefect_ttapi.capabilities import RULES
from prefect_ttapi.credentials import TTAPICredentials, shared_client
from prefect_ttapi.errors import InsufficientBalanceError
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.generation.engine import Engine, ledger_for
from prefect_ttapi.generation.files import Original, Provenance, note_of, without_mark
from prefect_ttapi.generation.limits import Limits
from prefect_ttapi.generation.persisting import Paid
from prefect_ttapi.generation.rescue import rescue_place
from prefect_ttapi.generation.runs import (
    GRACE,
    RunContext,
    async_twin,
    must_outlive_the_run,
    stop_of_caller,
    to_the_end,
)
from prefect_ttapi.images.renditions import Rendition, thumbnail_or_none, versions_of
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.markdown import PICTURES, Picture, delivery_markdown, preview_markdown
from prefect_ttapi.lineage.publishing import (
    balance_exhausted,
    image_key,
    images_delivered,
    materialise_images,
    publish,
)
from prefect_ttapi.lineage.shown import Shown, StoreLinks
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import DeliveredImage, Generation, PartialImage
from prefect_ttapi.stopping import Stop
from prefect_ttapi.storage.keys import DEFAULT_KEY
from prefect_ttapi.storage.settings import SavedForm, check_survives_json
from prefect_ttapi.storage.store import ImageStore

P = ParamSpec("P")
R = TypeVar("R")

#: (task run, nonce) of the cache key computed last in this context: how the key reaches the task's body.
_LAST_NONCE: ContextVar[tuple[str, str] | None] = ContextVar("ttapi_last_nonce", default=None)

#: How results, and parameters of background tasks (`delay`), are stored: as JSON, which has no secrets.
_JSON: Final = JSONSerializer(object_encoder="prefect_ttapi.tasks.encoded")

#: Previews asked for where the request doesn't say; the vendor makes no more.
PARTIAL_IMAGES: Final = 3


def encoded(value: object) -> Any:
    """Return what JSON holds of an object: Prefect's own way, but nothing that could not be had again.

    Raises:
        ValueError: it is a block with secrets that is not saved, or the flow that a background task is sent from.
    """
    for block in (value, *getattr(value, "__dict__", {}).values()):  # or an option that has one
        if isinstance(block, SavedForm):
            check_survives_json(block)
    if isinstance(value, Flow):
        raise ValueError(  # noqa: TRY004 - where the task is called from is wrong, not the type of an argument
            "nothing is sent: background tasks (delay) are sent from outside flows; in a flow, use submit or map"
        )
    return prefect_json_object_encoder(value)


class _Task(Task[P, R]):
    """A task that says why it is not sent to the background; Prefect's own error tells of serializers only."""

    def apply_async(self, *args: Any, **kwargs: Any) -> PrefectDistributedFuture[R]:
        """Send it to the background, for whoever serves it."""
        try:
            return super().apply_async(*args, **kwargs)
        except SerializationError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise


def _task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Return a decorator that makes a task; its results, and its parameters in the background, are JSON."""
    return lambda function: _Task(function, result_serializer=_JSON, **options)


@dataclass
class RequestHash(CachePolicy):
    """The cache policy of the generate tasks: same API, store and request, and a ledger record that still counts.

    The ledger decides when Prefect says "Cached". A Prefect cache hit never runs the task's body, so a stale hit must
    be impossible by the key alone. Each payment draws a nonce that its ledger record keeps, and the key covers it: a
    record that is gone, expired or to be refreshed, or one whose objects are gone, leads to a new nonce and hence to a
    key that no old result has.

    It composes with Prefect's other policies (`REQUEST_HASH + RUN_ID`). Looking up costs one read of the store and
    one existence check per image. Where the store can't be reached there is no key, and the task itself fails
    before anything is sent.
    """

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],  # noqa: ARG002 - the base class's signature
        **kwargs: Any,  # noqa: ARG002
    ) -> str | None:
        """Return the key of a task run; None where there can be none, and the task itself says why."""
        credentials, store = inputs.get("credentials"), inputs.get("store")
        if not isinstance(credentials, TTAPICredentials) or not isinstance(store, ImageStore):
            return None  # the task itself says what is wrong with its arguments
        try:
            request_hash = ImageRequest.model_validate(inputs["request"]).request_hash
        except ValueError:
            return None
        run = RunContext.current(task_ctx)
        ledger = ledger_for(credentials, store, run.run_id)
        record = ledger.look_up(request_hash, run.not_before_for(task_ctx))
        nonce = record.result_key or str(record.generation.created_at) if record else uuid.uuid4().hex
        _LAST_NONCE.set((str(task_ctx.task_run.id), nonce))
        named = "\n".join((credentials.api_origin, store.identity, request_hash, nonce))
        return "ttapi-" + hashlib.sha256(named.encode()).hexdigest()


REQUEST_HASH = RequestHash()


def _nonce_of(task_ctx: TaskRunContext | None) -> str:
    """Return the nonce in this task run's cache key; a new one where no key was computed."""
    last = _LAST_NONCE.get()
    return last[1] if last and task_ctx and last[0] == str(task_ctx.task_run.id) else uuid.uuid4().hex


def _generate_name(parameters: dict[str, Any]) -> str:
    """`generate-gpt-image-2-3f9a12`; illegal arguments must not fail here but in the task, with their own error."""
    try:
        request = ImageRequest.model_validate(parameters["request"])
    except ValueError:
        return "generate-illegal-request"
    return f"generate-{request.model}-{request.request_hash[:6]}"


def _deliver_name(parameters: dict[str, Any]) -> str:
    """`deliver-gpt-image-2-3f9a12`."""
    generation = parameters["generation"]
    if not isinstance(generation, Generation):
        return "deliver-illegal-generation"
    return f"deliver-{generation.request.model}-{generation.request_hash[:6]}"


#: What each task and its twin are made with.
_GENERATING: Final[dict[str, Any]] = {
    "name": "generate-images",
    "task_run_name": _generate_name,
    "cache_policy": REQUEST_HASH,
}
_DELIVERING: Final[dict[str, Any]] = {
    "name": "deliver-images",
    "task_run_name": _deliver_name,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


def _generate(
    request: ImageRequest | Mapping[str, Any],
    credentials: TTAPICredentials,
    store: ImageStore,
    preview: bool,
    record_prompts: bool,
    stop: Stop,
) -> Generation:
    """Do the work of both tasks; once `stop` is set nothing is sent that is not under way."""
    _must_be(credentials, TTAPICredentials, "credentials")
    _must_be(store, ImageStore, "store")
    must_outlive_the_run(store, rescue_place(store.rescue_folder))
    task_ctx = TaskRunContext.get()
    run = RunContext.current(task_ctx)
    asked = ImageRequest.model_validate(request)
    if preview:
        asked = _with_previews(asked)
    shown = Shown(record_prompts)
    show = partial(_publish_preview, asked.request_hash, shown.prompt(asked))
    engine = Engine(
        shared_client(credentials),
        store,
        ledger_for(credentials, store, run.run_id, get_run_logger()),
        run,
        Limits(stop),
        run.not_before_for(task_ctx),
        result_key=_nonce_of(task_ctx),
        on_preview=show if preview and asked.stream else None,
    )
    try:
        with withholding(shown.withheld(asked)):
            paid = engine.generate(asked)
    except InsufficientBalanceError as error:
        balance_exhausted(credentials.api_origin, str(error))
        raise
    get_run_logger().info(_what_was_paid(paid))
    return paid.generation


def _with_previews(request: ImageRequest) -> ImageRequest:
    """Return the request as a stream with previews; unchanged for models that can't stream.

    >>> _with_previews(ImageRequest(prompt="a tree", model="gpt-image-1")).partial_images
    3
    """
    if "stream" not in RULES[request.model]:
        return request
    wanted = {"stream": True, "partial_images": request.partial_images or PARTIAL_IMAGES}
    return request.model_copy(update=wanted)


def _publish_preview(request_hash: str, caption: str, preview: PartialImage) -> None:
    """Show `preview` in the run's artifact for this request; each is a new version of it."""
    publish(
        "markdown",
        image_key(caption, request_hash, "preview"),
        preview_markdown(caption, preview),
        description=f"Request {request_hash[:12]} as it grows",
    )


def _what_was_paid(paid: Paid) -> str:
    made = paid.generation
    what = f"{made.request.model} {made.request_hash[:12]}, {len(made.images)} image(s)"
    if not paid.sent:
        return f"Paid nothing for {what}: in the store since {made.created_at:%Y-%m-%d %H:%M} UTC"
    tokens = f", {made.usage.total_tokens:,} tokens" if made.usage else ""
    calls = f", {made.api_calls} API calls" if made.api_calls > 1 else ""
    return f"Paid for {what}{tokens}{calls}, {made.seconds:.1f} s -> {made.images[0].uri}"


def _publish_artifact(
    generation: Generation,
    delivered: Sequence[DeliveredImage],
    originals: Sequence[Original],
    to: ImageStore,
    may_show: Shown,
    name: str,
) -> None:
    """Publish the artifact of one delivery, with thumbnails of the bytes that were fetched to be delivered."""
    row = may_show.row(Row.of(0, generation, delivered=tuple(delivered)))
    shown = [
        Picture(row, image, _thumbnail(original))
        for image, original in islice(zip(row.images, originals, strict=True), PICTURES)
    ]
    publish(
        "markdown",
        image_key(name or may_show.prompt(generation.request), generation.request_hash),
        delivery_markdown(row, shown, StoreLinks(to), generation.request_id),
        description=f"Where the images of request {generation.request_hash[:12]} are, and where they come from",
    )


def _thumbnail(original: Original) -> bytes | None:
    return thumbnail_or_none(lambda: original.fetch()())


def _must_be(value: object, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {kind.__name__}, not {type(value).__name__}")


@_task(**_GENERATING)
def generate_images(
    request: ImageRequest | Mapping[str, Any],
    credentials: TTAPICredentials,
    store: ImageStore,
    *,
    preview: bool = False,
    record_prompts: bool = True,
) -> Generation:
    """Return the images of `request` in `store`, where they are found, or are put after they were paid for now.

    Prefect's `refresh_cache` and `cache_expiration` decide which earlier answers count. The task has no retries of its
    own, because the client repeats what is surely not paid for.

    Args:
        request: what to make: a request, or a mapping of its fields.
        credentials: the API key, and how patient to be.
        store: where the images and the ledger are.
        preview: show the picture while it grows, in an artifact of the run. This works for GPT Image models only. It
            asks for `partial_images` previews (3 unless the request says), which the vendor may charge a little for.
        record_prompts: show the prompt beside a preview, and where the API quotes it; otherwise the request's hash.

    Returns:
        References to the stored images; no bytes.

    Raises:
        pydantic.ValidationError: the request is illegal; nothing was sent.
        TTAPIError: the API did not give the images; `outcome` says whether they may have been paid for.
        StoreError: the store failed.
    """
    caller = stop_of_caller()
    stop = caller or Stop()
    call = partial(_generate, request, credentials, store, preview, record_prompts, stop)
    # the async twin is in a thread of its own already
    return call() if caller else to_the_end(call, stop, of="the task")


agenerate_images = _task(**_GENERATING)(async_twin(generate_images.fn, of="the task", grace=GRACE))


@_task(**_DELIVERING)
def deliver_images(
    generation: Generation,
    to: ImageStore,
    key: str = DEFAULT_KEY,
    values: Mapping[str, Any] | None = None,
    source: ImageStore | None = None,
    *,
    record_prompts: bool = True,
    renditions: Sequence[Rendition | Mapping[str, Any]] = (),
    keep_original: bool = True,
    overwrite: bool = False,
    provenance: Provenance | Mapping[str, Any] | None = None,
) -> list[DeliveredImage]:
    """Copy the images to where their consumers look, under keys that a template makes.

    Each copy is a Prefect asset that the run materialises, with the copy's address as its key, and causes an event
    `ttapi.image.delivered`.

    Args:
        generation: what `generate_images` gave.
        to: the store to deliver to; keys are below its `url`.
        key: a template over `name slug hash index ext model size date batch rendition` and the names in `values`.
        values: more names for the template.
        source: the store that the images came from; needed if it can't be read with the settings of `to`.
        record_prompts: show the prompt, and what the model made of it, in artifact, asset, event and object; otherwise
            the request's hash stands in its place, also in a key's `slug`. The ledger has it in either case.
        renditions: smaller or lighter versions to deliver too, e.g. `[Rendition(max_size=1024)]`. In a key template
            `{rendition}` is the name of each; that of the image itself is `original`.
        keep_original: deliver the image itself, too.
        overwrite: replace whatever is at a key.
        provenance: mark copies of images that don't say themselves that a model made them, e.g. `Provenance()`, and
            sign all files, e.g. `Provenance(sign=ContentCredentialsSigner.load("shop"))`. By default, copies are the
            images byte for byte, and renditions are marked, see `Rendition`.

    Raises:
        KeyTemplateError: the template is illegal, or two images would get one key.
        KeyTakenError: another object already has a key (and `overwrite` is off).
        StoreError: a store failed.
        PictureError: an image can't be decoded, so that it has no renditions, or can't be marked.
        SigningError: a file can't be signed.
    """
    _must_be(generation, Generation, "generation")
    _must_be(to, ImageStore, "to")
    must_outlive_the_run(to)
    run = RunContext.current()
    shown = Shown(record_prompts)
    delivery = Delivery(
        to,
        key,
        batch=run.flow_name,
        date=run.date,
        source=source,
        versions=versions_of(renditions, keep_original=keep_original),
        overwrite=overwrite,
        run_id=run.flow_run_id,
        provenance=None if provenance is None else Provenance.model_validate(provenance),
    )
    originals = delivery.originals(generation)
    delivered = delivery.deliver(generation, values or {}, shown.prompt(generation.request), originals)
    get_run_logger().info(
        f"Delivered {len(delivered)} image(s) of {generation.request_hash[:12]} -> {delivered[0].uri}"
    )
    if lacking := without_mark(delivered, delivery.versions, delivery.provenance, delivery.signer):
        get_run_logger().warning(note_of(lacking))
    materialise_images(generation, delivered, shown)
    images_delivered(generation, delivered, shown)
    name = str((values or {}).get("name") or "")
    _publish_artifact(generation, delivered, originals, to, shown, name)
    return delivered


adeliver_images = _task(**_DELIVERING)(async_twin(deliver_images.fn, of="the delivery"))
