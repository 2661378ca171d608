"""The API key, a store's secret and signed addresses stay out of everything that Prefect keeps or shows."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import pytest
from prefect import flow
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH

from prefect_ttapi.batch import generate_batch
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from prefect_ttapi.tasks import deliver_images, generate_images
from tests.support.database import marked_text_in_the_database
from tests.support.s3 import S3Server

KEY = "marked-api-key-5d1f0b7c"
SECRET = "marked-store-secret-93ac"
MARKS = (KEY, SECRET)

#: One prompt for each way in which a call can fail.
FAILURES = (
    *(f"[[sandbox:status={status}]]" for status in (400, 401, 402, 403, 404, 429, 499, 500, 504, 524)),
    "[[sandbox:moderation]]",
    "[[sandbox:failed]]",
    "[[sandbox:cut]]",
    "[[sandbox:hang]]",
)


def marked_files(folder: Path) -> list[Path]:
    """Files below `folder` that hold a mark."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(mark.encode() in path.read_bytes() for mark in MARKS)]


@pytest.mark.usefixtures("prefect_server")
def test_no_failure_brings_a_secret_into_logs_results_or_the_database(
    s3_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Every failing call, in tasks and in a batch, at debug level, with a marked key and a marked store secret."""
    caplog.set_level(logging.DEBUG)
    settings = s3_server.settings(secret_access_key=SECRET)
    shown: list[str] = []
    with Sandbox(tiny=True, items="url") as sandbox:
        credentials = TTAPICredentials(
            api_key=KEY, base_url=sandbox.base_url, read_timeout=0.5, max_attempts=1
        )
        store = ImageStore(url=f"s3://{s3_server.new_bucket()}/images", **settings)
        requests = [{"prompt": f"{failure} a picture"} for failure in FAILURES]

        @flow
        def failing():
            for request in [*requests, {"prompt": "a good picture"}]:
                state = generate_images.with_options(retries=1)(
                    request, credentials, store, return_state=True
                )
                result = state.result(raise_on_failure=False)
                if isinstance(result, Exception):
                    shown.append("".join(traceback.format_exception(result)) + repr(result))
            deliver_images(result, store, key="copies/{slug}.{ext}")
            report = generate_batch(
                [request for request in requests if "40" not in request["prompt"]],
                credentials,
                store,
                raise_on_failure=False,
                name="failing",
            )
            shown.append(report.model_dump_json() + str(list(report.rows)))

        failing()
        nowhere = ImageStore(url="s3://no-such-bucket", **settings)
        with pytest.raises(Exception, match="no-such-bucket") as refused:
            generate_batch(requests, credentials, nowhere)
        shown.append("".join(traceback.format_exception(refused.value)))
    APILogWorker.instance().drain()
    assert len(shown) >= len(FAILURES)
    assert not [text for text in shown if any(mark in text for mark in MARKS)]
    assert not [line for line in caplog.messages if any(mark in line for mark in MARKS)]
    assert not [line for line in caplog.messages if "/files/" in line], "an image's address is in the log"
    assert marked_text_in_the_database(MARKS) == []
    assert marked_files(Path(PREFECT_LOCAL_STORAGE_PATH.value())) == []
