"""What version 0.1.0 wrote is read as before: `fixtures/store-0.1.0.tar.gz` is a store and a shop of its making.

One batch made them, called season: five requests with images, of which one is a duplicate, each delivered with a
rendition; a refused prompt; a send of unknown outcome. `/PLACE` stands for the folder where they were made.
"""

from __future__ import annotations

import os
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from prefect import flow

from prefect_ttapi import ImageStore, Rendition, generate_batch
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.lineage.gallery import ThumbnailPack
from prefect_ttapi.lineage.manifest import read_manifest
from prefect_ttapi.sandbox import Sandbox

ARCHIVE = Path(__file__).parent / "fixtures" / "store-0.1.0.tar.gz"

REQUESTS = [
    {"prompt": "a red boat, Größe äöü", "model": "gpt-image-1"},
    {"prompt": "a blue boat", "model": "dall-e-3"},
    {"prompt": "two cats", "model": "gpt-image-2", "n": 2, "size": "256x256"},
    {"prompt": "a red boat, Größe äöü", "model": "gpt-image-1"},
    {"prompt": "refused [[sandbox:moderation]]", "model": "gpt-image-1"},
    {"prompt": "lost [[sandbox:status=504]]", "model": "gpt-image-1"},
    {
        "prompt": "a lightweight fox",
        "model": "gpt-image-1",
        "output_format": "webp",
        "output_compression": 50,
    },
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder with `store` and `shop`, as if they had been made here, with all modification times."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in (path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".html")):
        made = path.stat()
        path.write_bytes(path.read_bytes().replace(b"/PLACE", str(tmp_path).encode()))
        os.utime(path, ns=(made.st_mtime_ns, made.st_mtime_ns))
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


@pytest.mark.usefixtures("prefect_server")
def test_the_same_batch_again_pays_for_nothing_and_writes_no_image(
    place: Path, sandbox: Sandbox, credentials: TTAPICredentials
):
    """Records, images, copies and renditions of 0.1.0 stand; only what had no image is sent again."""
    store, shop = ImageStore(url=str(place / "store")), ImageStore(url=str(place / "shop"))
    before = contents(place / "shop") | contents(place / "store" / "images")

    @flow
    def season():
        return generate_batch(
            REQUESTS,
            credentials,
            store,
            deliver_to=shop,
            key="{name}-{rendition}-{index}.{ext}",
            values=[{"name": f"n{row}"} for row in range(len(REQUESTS))],
            renditions=[Rendition(max_size=32)],
            name="season",
            raise_on_failure=False,
        )

    report = season()
    statuses = [row.status for row in report.rows]
    assert statuses == ["cached", "cached", "cached", "cached", "failed", "failed", "cached"]
    assert [row.error_type for row in report.rows if row.error_type] == [
        "ModerationError",
        "UnknownOutcomeError",
    ]
    assert sandbox.calls == 2
    assert contents(place / "shop") | contents(place / "store" / "images") == before
    assert [len(row.delivered) for row in report.rows] == [2, 2, 4, 2, 0, 0, 2]


def test_its_manifest_is_read_row_by_row(place: Path):
    """Each row has its request, its images and its copies."""
    (manifest,) = (place / "store" / "batches").glob("*/manifest.jsonl")
    with manifest.open("rb") as lines:
        rows = list(read_manifest(lines))
    assert [row.request.prompt for row in rows] == [request["prompt"] for request in REQUESTS]
    assert [len(row.images) for row in rows] == [1, 1, 2, 1, 0, 0, 1]
    assert all(Path(copy.uri.removeprefix("file://")).is_file() for row in rows for copy in row.delivered)


def test_its_thumbnails_are_read(place: Path):
    """The pictures of its page are taken again: each of its images has one."""
    (archive,) = (place / "store" / "batches").glob("*/thumbnails.zip")
    images = [path.stem for path in (place / "store" / "images").iterdir()]
    with closing(ThumbnailPack(archive.open("rb"))) as pack:
        assert len(images) == 5
        assert all(pack.get(sha256) for sha256 in images)
