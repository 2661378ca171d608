"""Publishing: from flows, tasks and their threads, never outside a run, and never at the cost of the run."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prefect import flow, get_client, task
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact

from prefect_ttapi.lineage.publishing import (
    OWN_KEYS,
    Progress,
    batch_key,
    image_key,
    publish,
)


def published(key: str) -> list[Artifact]:
    """All artifacts of a key, as the server has them."""
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


@example(59 * "0" + ":0", "")
@given(st.text(st.characters()), st.sampled_from(["", "images"]))
def test_keys_are_what_prefect_takes(name: str, kind: str) -> None:
    """Whatever a batch is called, its key has lower case letters, digits and dashes only."""
    for key in (batch_key(name, kind), image_key(name, "ab" * 32)):
        assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", key)
        assert len(key) < 100


def test_names_that_read_alike_stay_apart() -> None:
    """Two batches whose names differ in case or script only don't share their history."""
    names = ["campaign", "Campaign", "campaign!", "秋", "春", "x" * 100, "x" * 101]
    assert len({batch_key(name) for name in names}) == len(names)
    assert batch_key("campaign") == "batch-campaign"


@pytest.mark.usefixtures("prefect_server")
class TestPublishing:
    def test_in_a_flow(self) -> None:
        """A flow's artifacts belong to its run; a table arrives as it was given."""

        @flow
        def lineage() -> UUID | None:
            publish("table", "ttapi-table", [{"row": 0, "prompt": "a | b"}])
            return publish("markdown", "ttapi-in-a-flow", "# hello", "where it came from")

        made = lineage()
        (artifact,) = published("ttapi-in-a-flow")
        assert (artifact.id, artifact.data, artifact.description) == (made, "# hello", "where it came from")
        assert artifact.flow_run_id
        assert published("ttapi-table")[0].data == '[{"row": 0, "prompt": "a | b"}]'

    def test_in_a_task(self) -> None:
        """An artifact published in a task belongs to the task's run and its flow's."""

        @task
        def deliver() -> None:
            publish("markdown", "ttapi-in-a-task", "hello")

        @flow
        def lineage() -> None:
            deliver.submit().result()

        lineage()
        (artifact,) = published("ttapi-in-a-task")
        assert artifact.flow_run_id
        assert artifact.task_run_id

    def test_in_an_async_flow(self) -> None:
        """In an async flow an artifact is written, from the loop's thread and from a worker's."""

        @flow
        async def lineage() -> None:
            publish("markdown", "ttapi-in-an-async-flow", "loop")
            progress = Progress("ttapi-in-an-async-flow-progress")
            await asyncio.to_thread(progress.finish)
            await asyncio.to_thread(publish, "markdown", "ttapi-in-an-async-flow", "worker")

        asyncio.run(lineage())
        assert sorted(str(artifact.data) for artifact in published("ttapi-in-an-async-flow")) == [
            "loop",
            "worker",
        ]
        assert published("ttapi-in-an-async-flow-progress")[0].data == 100.0

    def test_descriptions(self) -> None:
        """Nothing in a description is markup."""

        @flow
        def lineage() -> None:
            publish("markdown", "ttapi-described", "hello", "of a <img src=x>")

        lineage()
        (artifact,) = published("ttapi-described")
        assert artifact.description == "`of a <img src=x>`"

    def test_many_images_do_not_bury_the_page_of_artifacts(self) -> None:
        """Of 300 requests of a flow run the first few have a key each, and keep it; the others share one."""
        hashes = [f"{n:06x}" + "0" * 58 for n in range(300)]

        @flow(name="Catalogue")
        def lineage() -> list[str]:
            return [image_key("a fox", each) for each in [*hashes, hashes[0]]]

        made = lineage()
        assert made[0] == made[-1] == "image-a-fox-000000"
        assert len(set(made[:OWN_KEYS])) == OWN_KEYS
        (shared,) = set(made[OWN_KEYS:-1])
        assert re.fullmatch("images-catalogue-[0-9a-f]{6}", shared)
        assert lineage()[0] == made[0]

    def test_versions_of_a_key_are_a_history(self) -> None:
        """Publishing a key again adds to its history."""

        @flow
        def lineage(text: str) -> None:
            publish("markdown", "ttapi-history", text)

        lineage("first")
        lineage("second")
        assert sorted(str(artifact.data) for artifact in published("ttapi-history")) == ["first", "second"]

    def test_outside_a_run(self) -> None:
        """Outside any run nothing is published, and nobody is warned of what Prefect will remove."""
        assert publish("markdown", "ttapi-outside", "hello") is None
        progress = Progress("ttapi-outside")
        progress.update(1, 2)
        progress.finish()
        assert published("ttapi-outside") == []

    def test_a_refused_artifact_fails_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        """Where Prefect refuses an artifact, the run goes on and its log says why."""

        @flow
        def lineage() -> tuple[UUID | None, str]:
            progress = Progress("No key at all")
            progress.finish()
            return publish("markdown", "No key at all", "hello"), "went on"

        with caplog.at_level(logging.WARNING):
            assert lineage() == (None, "went on")
        assert caplog.text.count("An artifact was not published") == 2

    def test_progress_at_a_sensible_rate(self) -> None:
        """Progress is shown at most every so many seconds, and at the end however soon that is."""

        def shown(key: str) -> object:
            (artifact,) = published(key)
            return artifact.data, artifact.description

        @flow
        def lineage(every: int) -> list[object]:
            key = f"ttapi-progress-every-{every}"
            progress = Progress(key, "starting", every=every)
            seen = []
            for done, total in [(2, 8), (9, 8), (5, None)]:
                progress.update(done, total, f"{done} of {total}")
                seen.append(shown(key))
            progress.finish("done")
            return [*seen, shown(key)]

        assert lineage(every=3600) == [(0.0, "starting")] * 3 + [(100.0, "done")]
        assert lineage(every=0) == [(25.0, "2 of 8"), (100.0, "9 of 8"), (0.0, "5 of None"), (100.0, "done")]

    def test_progress_from_any_thread(self) -> None:
        """Threads that know nothing of the run update its progress; of those that come at once, one does."""

        def in_threads(work: Callable[[], None]) -> None:
            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        @flow
        def lineage() -> None:
            progress = Progress("ttapi-progress-threads", every=0)
            in_threads(lambda: progress.update(1, 2))

        lineage()
        (artifact,) = published("ttapi-progress-threads")
        assert artifact.data == 50.0
