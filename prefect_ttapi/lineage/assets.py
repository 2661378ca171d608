"""Prefect assets: what a run made, and what others make of it.

A delivered object is an asset of its own. A batch is one asset, its manifest: Prefect drops an event with more than
100 upstream assets, and that event would be the user's. Money was paid before: an asset that fails never fails
the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.logging import get_logger, get_run_logger
from pydantic import ValidationError

from prefect_ttapi.lineage.events import image_facts
from prefect_ttapi.lineage.withheld import Shown
from prefect_ttapi.results import DeliveredImage, Generation

logger: Final = get_logger(__name__)

#: Who made it, in Prefect's words.
MADE_BY: Final = "prefect-ttapi"

#: Delivered objects of one flow run that its later tasks are linked to: a task that takes all of them still has
#: its own event, with a few places left for assets of the user's own.
TRACKED: Final = 90

R = TypeVar("R")


def asset_at(uri: str, *, name: str | None = None, url: str | None = None) -> Asset | None:
    """Return the asset at `uri`, or None if Prefect takes no such key: over 512 characters, or with a `%` or the like.

    >>> asset_at("s3://bucket/shop/a.png"), asset_at("file:///srv/a%20b.png")
    (Asset(key='s3://bucket/shop/a.png'), None)
    """
    try:
        return Asset(key=uri, properties=AssetProperties(name=name or uri.rpartition("/")[2], url=url))
    except ValidationError:
        return None


def materialise_images(generation: Generation, copies: Iterable[DeliveredImage], shown: Shown) -> None:
    """Make the running task the one that materialises `copies`; outside a task nothing happens."""
    facts = {
        found: image_facts(generation, copy, shown)
        for copy in copies
        if (found := asset_at(copy.uri, url=copy.url))
    }
    try:
        _declare(facts)
    except Exception as error:  # another Prefect may keep its assets elsewhere
        logger.warning("Delivered images are no assets of this run: %s: %s", type(error).__name__, error)


def materialise_batch(report: R, facts: Mapping[str, Any]) -> R:
    """Return `report` itself, as the result of a task run of the flow that materialises the batch's manifest.

    A `@materialize` task of the flow that is given this very object has the manifest upstream. Outside a run, and
    where Prefect takes no such key, there is no task run.

    Args:
        report: the batch's report.
        facts: what `BatchReport.facts` says of it.
    """
    manifest = asset_at(facts["manifest_uri"], name=facts["name"])
    if manifest is None or FlowRunContext.get() is None:
        return report

    @materialize(manifest, by=MADE_BY, name="batch-manifest", cache_policy=NO_CACHE, persist_result=False)
    def record_manifest(report: R) -> R:
        add_asset_metadata(manifest, dict(facts))
        get_run_logger().info(f"The batch's manifest: {manifest.key}")
        return report

    try:
        return record_manifest(report)
    except Exception as error:
        logger.warning("The manifest is no asset of this run: %s: %s", type(error).__name__, error)
        return report


def _declare(facts: Mapping[Asset, dict[str, Any]]) -> None:
    """Tell Prefect what the running task materialises: a decorator can't, since keys are known only by now."""
    from prefect.context import AssetContext  # no public name: its absence must not break the package

    context = AssetContext.get()
    if context is None or not facts:
        return
    context.downstream_assets.update(facts)
    context.materialized_by = context.materialized_by or MADE_BY
    for made, metadata in facts.items():
        context.add_asset_metadata(made.key, metadata)
    flow = FlowRunContext.get()
    tracked: set[Asset] = set().union(*list(flow.task_run_assets.values())) if flow else set()
    if len(tracked) + len(facts) <= TRACKED:
        context.update_tracked_assets()
