"""Fetching one image with a downloader, and what it says when it gives up."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_ttapi.api.downloads import Downloader
from prefect_ttapi.errors import DownloadError, Outcome
from prefect_ttapi.images.headers import ImageFacts
from prefect_ttapi.images.spool import Spool
from tests.support.hostile import Behaviour, answer, png

IMAGE = png(noise=200_000)


#: Between the tries for one image, until the usual patience is over, where chance gives the most.
WAITS = [0.5, 1, 2, 4, 8, 16, *[30] * 8]


def fetch(downloader: Downloader, url: str, **options: Any) -> tuple[Spool, ImageFacts]:
    return downloader.fetch(SecretStr(url), **options)


def redirect(to: str, status: int = 302) -> Behaviour:
    return answer(status, b"moved", {"Location": to, "Set-Cookie": "session=1; Path=/"})


def refused(downloader: Downloader, url: str, message: str, **options: Any) -> DownloadError:
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(downloader, url, **options)
    assert caught.value.outcome is Outcome.UNUSABLE
    assert "paid" in caught.value.message
    assert not re.search(r"https?:|s3cr3t|127\.0\.0\.1|example", str(caught.value))
    return caught.value
