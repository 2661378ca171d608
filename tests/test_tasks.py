from __future__ import annotations

import asyncio
import io
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from prefect import flow, task, unmapped
from prefect.cache_policies import RUN_ID
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, TaskRunFilter, TaskRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, PREFECT_TASKS_REFRESH_CACHE, temporary_settings
from prefect.task_worker import aserve
from pydantic import ValidationError

from prefect_ttapi import (
    REQUEST_HASH,
    AuthenticationError,
    ContentCredentialsSigner,
    Generation,
    ImageRequest,
    ImageStore,
    Provenance,
    StoreError,
    TTAPICredentials,
    adeliver_images,
    agenerate_images,
    deliver_images,
    generate_images,
)
from prefect_ttapi.images.signing import read_signature
from prefect_ttapi.lineage.publishing import image_key
from prefect_ttapi.sandbox import Sandbox
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server

pytestmark = pytest.mark.usefixtures("prefect_server")

REQUEST = ImageRequest(prompt="a heron in reeds", model="gpt-image-2", size="64x64")


def state_names(
    store: ImageStore, credentials: TTAPICredentials, *, calls: int = 2, **options: object
) -> list[str]:
    """The state that each of several runs of one request ends in."""

    @flow
    def again() -> list[str]:
        varied = generate_images.with_options(**options) if options else generate_images
        return [varied(REQUEST, credentials, store, return_state=True).name for _ in range(calls)]

    return again()


def artifacts_like(key: str) -> list[str]:
    """What artifacts with a key of this pattern hold, each version by itself."""

    async def read() -> list[str]:
        async with get_client() as client:
            wanted = ArtifactFilter(key=ArtifactFilterKey(like_=key))
            return [artifact.data for artifact in await client.read_artifacts(artifact_filter=wanted)]

    return asyncio.run(read())


async def in_the_background(
    store: ImageStore, shop: ImageStore, signed: Provenance, *blocks: object
) -> tuple[Generation, str]:
    """Serve both tasks, send what they are to do, and return the generation and where its copy is."""
    serving = asyncio.create_task(aserve(generate_images, deliver_images))
    try:
        sent = await asyncio.to_thread(generate_images.delay, REQUEST.model_dump(), *blocks)
        made = await sent.result_async(timeout=30)
        delay = partial(deliver_images.delay, made, shop, "{slug}.{ext}", source=store, provenance=signed)
        sent = await asyncio.to_thread(delay)
        (copy,) = await sent.result_async(timeout=30)
        return made, copy.uri
    finally:
        serving.cancel()
        await asyncio.wait([serving])


@pytest.mark.integration
def test_background_tasks_have_saved_blocks_and_no_secret_is_stored(
    credentials, s3_server: S3Server, new_bucket, sandbox: Sandbox, tmp_path: Path
):
    """Blocks with secrets are sent by reference, and loaded where the task runs; others are refused with what to do."""
    mark = "marked-store-secret-5f0c"
    store = ImageStore(url=f"s3://{new_bucket()}", **s3_server.settings(secret_access_key=mark))
    shop = ImageStore(url=str(tmp_path / "shop"))  # without secrets: as it is
    for blocks in ((credentials, shop), (credentials.model_copy(update={"read_timeout": 9.0}), store)):
        with pytest.raises(ValueError, match=r"nothing is sent: .* has secrets, .*save the block"):
            generate_images.delay(REQUEST, *blocks)
    assert credentials.save("sent-to-the-background", overwrite=True)
    assert store.save("sent-to-the-background", overwrite=True)
    signer = ContentCredentialsSigner.for_testing("sent-to-the-background")
    assert signer.save("sent-to-the-background", overwrite=True)
    with pytest.raises(ValueError, match=r"nothing is sent: .* has secrets, .*save the block"):
        deliver_images.delay(None, shop, provenance={"sign": ContentCredentialsSigner.for_testing()})

    loaded = TTAPICredentials.load("sent-to-the-background"), ImageStore.load("sent-to-the-background")
    signed = Provenance(sign=ContentCredentialsSigner.load("sent-to-the-background"))
    made, copy = asyncio.run(in_the_background(store, shop, signed, *loaded))
    found = read_signature(io.BytesIO(shop.read_bytes(copy)), "image/png")
    assert found is not None
    assert found.source_sha256 == made.images[0].sha256
    assert sandbox.calls == 1

    @flow
    def inside() -> None:
        generate_images.delay(REQUEST, credentials, store)

    with pytest.raises(ValueError, match=r"background tasks .* are sent from outside flows"):
        inside()
    kept = [path for path in Path(PREFECT_LOCAL_STORAGE_PATH.value()).rglob("*") if path.is_file()]
    assert signer.private_key is not None
    line = signer.private_key.get_secret_value().splitlines()[1]
    secrets = [mark.encode(), credentials.api_key.get_secret_value().encode(), line.encode()]
    assert len(kept) > 2
    assert [path for path in kept if any(secret in path.read_bytes() for secret in secrets)] == []


@pytest.mark.integration  # Prefect 3.7.5 can't send anything under the settings of a test session
def test_a_changed_block_is_not_sent_as_the_saved_one(
    credentials, store, s3_server: S3Server, sandbox: Sandbox
):
    """A background task would work with what is saved: it might pay again, in another store than was asked for."""
    pictures = ImageStore(url="s3://pictures", **s3_server.settings())
    for block in (credentials, pictures):
        block.save("changed-before-it-is-sent", overwrite=True)
    elsewhere = pictures.model_copy(update={"url": "s3://elsewhere"})
    elsewhere_paid = credentials.model_copy(update={"base_url": "https://api.ttapi.org"})
    for blocks, field in (((credentials, elsewhere), "url"), ((elsewhere_paid, store), "base_url")):
        with pytest.raises(ValueError, match=f"nothing is sent: .* has another {field} than is saved"):
            generate_images.delay(REQUEST, *blocks)
    assert sandbox.calls == 0


def test_a_second_run_is_cached_and_calls_nothing(store, credentials, sandbox: Sandbox):
    """The second run of a request shows Prefect's state Cached, and the API hears of it once."""
    assert state_names(store, credentials) == ["Completed", "Cached"]
    assert state_names(store, credentials) == ["Cached", "Cached"]
    assert sandbox.calls == 1


def test_the_ledger_answers_where_prefect_has_forgotten(store, credentials, sandbox: Sandbox, tmp_path: Path):
    """With another result storage, as on another machine, the task runs but nothing is called."""
    first = generate_images(REQUEST, credentials, store)
    elsewhere = generate_images.with_options(result_storage=None, persist_result=False, cache_policy=None)
    assert elsewhere(REQUEST, credentials, store) == first
    assert sandbox.calls == 1


def test_a_deleted_image_is_never_served_from_the_cache(store, credentials, sandbox: Sandbox):
    """After an object or the whole store is gone, the old result is not served: it is paid for again."""
    first = generate_images(REQUEST, credentials, store)
    Path(first.images[0].uri.removeprefix("file://")).unlink()
    assert state_names(store, credentials) == ["Completed", "Cached"]
    assert sandbox.calls == 2


def test_refresh_cache_pays_once_per_run(store, credentials, sandbox: Sandbox):
    """`refresh_cache` pays anew, but what this very run paid for counts for its second try."""
    assert state_names(store, credentials, refresh_cache=True) == ["Completed", "Completed"]
    assert sandbox.calls == 1
    assert state_names(store, credentials, refresh_cache=True) == ["Completed", "Completed"]
    assert sandbox.calls == 2
    assert state_names(store, credentials) == ["Cached", "Cached"]
    assert sandbox.calls == 2


def test_the_refresh_setting_works_as_the_option_does(store, credentials, sandbox: Sandbox):
    """PREFECT_TASKS_REFRESH_CACHE refreshes, though the task's own option is None then."""
    generate_images(REQUEST, credentials, store)
    with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}):
        generate_images(REQUEST, credentials, store)
    assert sandbox.calls == 2


def test_cache_expiration_ends_what_counts(store, credentials, sandbox: Sandbox):
    """An image older than `cache_expiration` is paid for again, also where only the ledger knows it."""
    generate_images(REQUEST, credentials, store)
    short = generate_images.with_options(cache_expiration=timedelta(milliseconds=1))
    short(REQUEST, credentials, store)
    assert sandbox.calls == 2
    generate_images.with_options(cache_expiration=timedelta(hours=1))(REQUEST, credentials, store)
    assert sandbox.calls == 2


def test_the_policy_composes(store, credentials, sandbox: Sandbox):
    """REQUEST_HASH can be added to Prefect's own policies: cached within a run, found in the ledger in the next."""
    policy = REQUEST_HASH + RUN_ID
    assert state_names(store, credentials, cache_policy=policy) == ["Completed", "Cached"]
    assert state_names(store, credentials, cache_policy=policy) == ["Completed", "Cached"]
    assert sandbox.calls == 1


def test_stores_and_variants_are_apart(store, shop, credentials, sandbox: Sandbox):
    """Another store or another variant is another image."""
    generate_images(REQUEST, credentials, store)
    generate_images(REQUEST, credentials, shop)
    generate_images(REQUEST.model_copy(update={"variant": "b"}), credentials, store)
    assert sandbox.calls == 3


def test_submit_and_map_in_a_sync_flow(store, shop, credentials, sandbox: Sandbox):
    """Twenty mapped requests, delivered by mapped tasks, are each paid for once."""
    requests = [ImageRequest(prompt=f"bird {number}", model="gpt-image-1") for number in range(20)]

    @flow
    def birds():
        generations = generate_images.map(requests, unmapped(credentials), unmapped(store))
        delivered = deliver_images.map(generations, unmapped(shop), key="{slug}.{ext}")
        alone = generate_images.submit(requests[0], credentials, store)
        return [images[0].uri for images in delivered.result()], alone.result()

    uris, alone = birds()
    assert sandbox.calls == 20
    assert sorted(uri.rpartition("/")[2] for uri in uris) == sorted(
        f"bird-{number}.png" for number in range(20)
    )
    assert isinstance(alone, Generation)


def test_async_twins_in_an_async_flow(store, shop, credentials, sandbox: Sandbox):
    """The async twins share the sync tasks' images, and many of them wait side by side."""
    requests = [ImageRequest(prompt=f"fish {number}") for number in range(12)]

    @flow
    async def fishes():
        made = await asyncio.gather(*(agenerate_images(request, credentials, store) for request in requests))
        return await asyncio.gather(*(adeliver_images(generation, shop) for generation in made))

    delivered = asyncio.run(fishes())
    assert len(delivered) == 12
    assert sandbox.calls == 12
    assert generate_images(requests[3], credentials, store).request == requests[3]
    assert sandbox.calls == 12


def test_a_sync_task_in_an_async_flow(store, credentials, sandbox: Sandbox):
    """The sync tasks work in async flows too, artifacts included."""

    @flow
    async def mixed():
        generation = generate_images(REQUEST, credentials, store)
        return deliver_images(generation, store, key="copies/{hash}.{ext}")

    assert asyncio.run(mixed())[0].uri.endswith(f"copies/{REQUEST.request_hash[:12]}.png")


def test_retries_after_a_later_failure_pay_nothing(store, credentials, sandbox: Sandbox):
    """A flow that fails after generating, and is retried, finds its images."""
    attempts = []

    @task
    def fragile() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise RuntimeError("a later step fails")

    @flow(retries=2, persist_result=False)
    def retried():
        generate_images.with_options(refresh_cache=True)(REQUEST, credentials, store)
        fragile()

    generate_images(REQUEST, credentials, store)
    retried()
    assert len(attempts) == 3
    assert sandbox.calls == 2


def test_run_names_say_what_is_made(store, credentials):
    """A generate run is called after its model and hash."""

    @flow
    def named():
        state = generate_images(REQUEST, credentials, store, return_state=True)
        return state.state_details.task_run_id

    task_run_id = named()

    async def read() -> TaskRun:
        async with get_client() as client:
            for _ in range(50):  # task runs reach the server by way of events
                found = await client.read_task_runs(
                    task_run_filter=TaskRunFilter(id=TaskRunFilterId(any_=[task_run_id]))
                )
                if found and found[0].name.startswith("generate-gpt"):
                    return found[0]
                await asyncio.sleep(0.1)
        raise AssertionError("the task run did not reach the server under its name")

    assert asyncio.run(read()).name == f"generate-gpt-image-2-{REQUEST.request_hash[:6]}"


def test_a_single_delivery_leaves_its_lineage(store, shop, credentials):
    """`deliver_images` writes an artifact whose key ends with 6 digits of the hash; each delivery is a version.

    Renditions are delivered beside the image.
    """

    mine = REQUEST.model_copy(update={"variant": "lineage"})

    @flow
    def delivering():
        generation = generate_images(mine, credentials, store)
        for number in (1, 2):
            copies = deliver_images(
                generation,
                shop,
                key=f"{number}/{{rendition}}.{{ext}}",
                renditions=[{"max_size": 32}],
                provenance={},
            )
        return copies

    copies = delivering()
    assert [copy.uri.rpartition("/")[2] for copy in copies] == ["original.png", "webp-32.webp"]
    assert copies[0].source_uri == copies[1].source_uri
    assert [copy.marks for copy in copies] == [("xmp",), ("xmp",)]

    found = artifacts_like(f"image-%-{mine.request_hash[:6]}")
    assert len(found) == 2
    assert all(mine.prompt in data for data in found)


def test_a_delivered_image_is_read_once(s3_server: S3Server, shop, credentials):
    """Copy, rendition and the artifact's thumbnail of an image on S3 are made of one reading of it."""
    mine = REQUEST.model_copy(update={"variant": "read once"})
    with meddling_proxy(s3_server.url, lambda *_: None) as proxy:
        settings = s3_server.settings(endpoint_url=proxy.url)
        there = ImageStore(url=f"s3://{s3_server.new_bucket()}", **settings)
        generation = generate_images(mine, credentials, there)
        proxy.seen.clear()
        deliver_images(generation, shop, key="{rendition}.{ext}", source=there, renditions=[{"max_size": 32}])
        assert [method for method, _ in proxy.seen] == ["GET"]
    (found,) = artifacts_like(f"image-%-{mine.request_hash[:6]}")
    assert "data:image/webp;base64," in found


def test_outside_a_flow_a_mapping_will_do(store, credentials):
    """Called as plain functions, with a mapping for the request."""
    generation = generate_images({"prompt": "a stone", "model": "dall-e-3"}, credentials, store)
    assert generation.request.model == "dall-e-3"
    assert generation.images[0].revised_prompt


def test_illegal_arguments_cost_nothing(store, credentials, sandbox: Sandbox):
    """An illegal request, or arguments of the wrong kind, fail with a clear error and no call."""
    with pytest.raises(ValidationError, match="size"):
        generate_images({"prompt": "x", "size": "1x1"}, credentials, store)
    with pytest.raises(TypeError, match="credentials must be TTAPICredentials, not str"):
        generate_images(REQUEST, "key", store)
    with pytest.raises(TypeError, match="store must be ImageStore"):
        generate_images(REQUEST, credentials, "./out")
    assert sandbox.calls == 0


def test_blocks_are_not_mapped(store, credentials, sandbox: Sandbox):
    """A block in `.map` is one value, with `unmapped` or without."""

    @flow
    def mapped():
        return generate_images.map([REQUEST], credentials, store).result()

    assert [made.request for made in mapped()] == [REQUEST]


def test_nothing_is_sent_where_the_store_can_not_be_written(credentials, sandbox: Sandbox, tmp_path: Path):
    """A store that can't be written fails before anything is paid for."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        generate_images(REQUEST, credentials, ImageStore(url=str(tmp_path / "file" / "store")))
    assert sandbox.calls == 0


def test_a_wrong_key_is_an_authentication_error(store):
    """The API's 401 comes out as AuthenticationError, with retries set by the user as without."""
    with Sandbox(api_key="right") as sandbox:
        wrong = TTAPICredentials(api_key="wrong", base_url=sandbox.base_url)
        with pytest.raises(AuthenticationError):
            generate_images.with_options(retries=1)(REQUEST, wrong, store)
        assert sandbox.calls == 2
        right = TTAPICredentials(api_key="right", base_url=sandbox.base_url)
        assert generate_images(REQUEST, right, store).images


def test_a_streamed_request_gives_the_completed_image(store, credentials, sandbox: Sandbox):
    """A request with stream=True is read as a stream, and is the same image as without."""
    streamed = ImageRequest(prompt="a comet", model="gpt-image-1", stream=True, partial_images=2)
    generation = generate_images(streamed, credentials, store)
    assert len(generation.images) == 1
    assert sandbox.requests[0]["stream"] is True
    assert generate_images(
        streamed.model_copy(update={"stream": False, "partial_images": 0}), credentials, store
    )
    assert sandbox.calls == 1


def test_a_preview_shows_the_picture_as_it_grows(store, credentials, sandbox: Sandbox):
    """With `preview=True` each partial picture is a version of an artifact; the image is the same as without."""

    @flow
    def watched():
        return generate_images(REQUEST, credentials, store, preview=True)

    generation = watched()
    found = artifacts_like(image_key(REQUEST.prompt, REQUEST.request_hash, "preview"))
    assert len(found) == 3
    assert all("data:image/webp;base64," in data for data in found)
    assert generation.request_hash == REQUEST.request_hash
    assert generate_images(REQUEST, credentials, store)
    assert sandbox.calls == 1


def test_a_preview_of_a_model_that_can_not_stream_is_a_plain_call(store, credentials, sandbox: Sandbox):
    """DALL-E has no stream: the image comes all the same."""
    assert generate_images({"prompt": "x", "model": "dall-e-3"}, credentials, store, preview=True).images
    assert "stream" not in sandbox.requests[0]
