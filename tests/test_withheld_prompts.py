"""`record_prompts=False`: prompts stay out of all that Prefect keeps or shows, and of what is delivered."""

from __future__ import annotations

import json
import logging
from contextlib import closing
from urllib.parse import urlsplit

import pytest
from prefect import flow
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from prefect_ttapi import (
    DeliveredImage,
    ImageStore,
    TTAPICredentials,
    deliver_images,
    generate_batch,
    generate_images,
)
from prefect_ttapi.errors import BatchError, InvalidRequestError, ModerationError
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.sandbox import Sandbox
from tests.support.database import marked_text_in_the_database
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server

MARK = "zqx81 heron"


def _metadata(s3_server: S3Server, copy: DeliveredImage) -> dict[str, str]:
    """What S3 says beside an object."""
    bucket, _, key = copy.uri.removeprefix("s3://").partition("/")
    with closing(s3_server.client()) as client:
        return client.head_object(Bucket=bucket, Key=key)["Metadata"]


@pytest.mark.usefixtures("prefect_server")
def test_a_prompt_that_is_not_recorded(
    s3_server: S3Server, credentials: TTAPICredentials, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither previews nor artifacts, assets, events, logs, keys or objects tell the prompt; the ledger does."""
    caplog.set_level(logging.DEBUG)
    store = ImageStore(url=f"s3://{s3_server.new_bucket()}/images", **s3_server.settings())
    shop = ImageStore(
        url=f"s3://{s3_server.new_bucket()}", **s3_server.settings(), upload={"prompt_in_metadata": True}
    )
    told: list[DeliveredImage] = []

    @flow(persist_result=False)
    def discreet() -> None:
        with pytest.raises(ModerationError):
            generate_images(
                {"prompt": f"[[sandbox:moderation]] {MARK}"}, credentials, store, record_prompts=False
            )
        generation = generate_images.with_options(persist_result=False)(
            {"prompt": MARK, "model": "gpt-image-2"}, credentials, store, preview=True, record_prompts=False
        )
        told.extend(deliver_images(generation, shop, record_prompts=False))
        assert (
            Ledger(store, credentials.api_origin, run_id="reader")
            .look_up(generation.request_hash)
            .generation.request.prompt
            == MARK
        )

    discreet()
    EventsWorker.instance().wait_until_empty()
    APILogWorker.instance().drain()
    assert not [line for line in caplog.messages if MARK in line]
    assert marked_text_in_the_database((MARK, "zqx81")) == []
    assert "zqx81" not in told[0].uri
    assert "zqx81" not in str(_metadata(s3_server, told[0]))


@pytest.mark.usefixtures("prefect_server")
def test_a_batch_s_prompts_that_are_not_recorded(
    store: ImageStore, shop: ImageStore, credentials: TTAPICredentials, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch tells its prompts to nobody, failed rows and illegal ones included; manifest and ledger have them."""
    caplog.set_level(logging.DEBUG)
    requests = [
        {"prompt": MARK, "model": "dall-e-3"},
        {"prompt": f"[[sandbox:moderation]] {MARK}"},
        {"prompt": f"illegal {MARK}", "n": 99},
    ]
    report = generate_batch(
        iter(requests), credentials, store, deliver_to=shop, raise_on_failure=False, record_prompts=False
    )
    EventsWorker.instance().wait_until_empty()
    APILogWorker.instance().drain()
    assert (report.totals.generated, report.totals.failed) == (1, 2)
    assert not [line for line in caplog.messages if MARK in line]
    assert marked_text_in_the_database((MARK, "zqx81")) == []
    assert "zqx81" not in store.read_bytes(report.gallery_uri).decode()
    assert [place for place in shop.list("") if "zqx81" in place.key] == []
    assert [MARK in row.prompt for row in report.rows] == [True, True, True]


@pytest.mark.usefixtures("prefect_server")
def test_a_prompt_in_metadata_where_asked_for(s3_server: S3Server, credentials: TTAPICredentials) -> None:
    """A store that asks for it gets the prompt of what is delivered, percent-encoded; other stores don't."""
    settings = {"url": f"s3://{s3_server.new_bucket()}", **s3_server.settings()}
    plain, asking = ImageStore(**settings), ImageStore(**settings, upload={"prompt_in_metadata": True})
    generation = generate_images({"prompt": "ein Reiher, 50 % grau, Zoë"}, credentials, plain)
    (without,) = deliver_images(generation, plain, key="plain.{ext}")
    (with_prompt,) = deliver_images(generation, asking, key="asking.{ext}")
    assert "prompt" not in _metadata(s3_server, without)
    assert _metadata(s3_server, with_prompt)["prompt"] == "ein Reiher, 50 %25 grau, Zo%C3%AB"


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("prompt", [MARK, f"{MARK} " * 60], ids=["short", "cut"])
def test_an_api_that_quotes_the_prompt(
    sandbox: Sandbox, store: ImageStore, caplog: pytest.LogCaptureFixture, prompt: str
) -> None:
    """What the API says of a prompt that is not recorded is told without it, by task, batch, manifest, and log."""
    caplog.set_level(logging.DEBUG)
    said = json.dumps({"error": {"message": f"'{prompt}' is not allowed"}}).encode()
    refusal = (422, {"Content-Type": "application/json"}, said)
    told: list[str] = []

    @flow(persist_result=False)
    def quoted(credentials: TTAPICredentials) -> None:
        asked = {"prompt": prompt, "model": "gpt-image-2"}
        with pytest.raises(InvalidRequestError) as one:
            generate_images(asked, credentials, store, record_prompts=False)
        with pytest.raises(BatchError) as many:
            generate_batch([asked], credentials, store, record_prompts=False)
        rows = many.value.report.rows
        told.extend([str(one.value), repr(one.value), str(many.value), *(row.error or "" for row in rows)])

    with meddling_proxy(sandbox.base_url, lambda *_: refusal) as proxy:
        quoted(TTAPICredentials(api_key="k", base_url=proxy.url + urlsplit(sandbox.base_url).path))
    EventsWorker.instance().wait_until_empty()
    APILogWorker.instance().drain()
    assert all("is not allowed" in words or "..." in words for words in told)
    assert [words for words in told if "zqx81" in words] == []
    assert [line for line in caplog.messages if "zqx81" in line] == []
    assert marked_text_in_the_database(("zqx81",)) == []
