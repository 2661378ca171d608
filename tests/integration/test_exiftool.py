"""exiftool, which we did not write, finds our marks where they belong, and what it writes itself is kept."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from prefect_ttapi import ImageStore, Provenance, Rendition
from prefect_ttapi.generation.delivery import Delivery
from prefect_ttapi.images.labels import Labels, read_labels, unmark
from prefect_ttapi.images.renditions import versions_of
from prefect_ttapi.images.xmp import GENERATED
from prefect_ttapi.requests import ImageRequest
from tests.support.generations import fresh_image, generation_of
from tests.support.rows import picture

pytestmark = pytest.mark.integration

REQUEST = ImageRequest(prompt='a "lighthouse" & Zoë <dusk>', model="gpt-image-2")
FORMS = ["PNG", "JPEG", "WEBP"]


def exiftool(*words: str) -> str:
    return subprocess.run(["exiftool", *words], capture_output=True, text=True, check=True, timeout=60).stdout


def told(*paths: Path) -> list[dict[str, Any]]:
    """What exiftool reads in each file, with raw values, and what it complains of."""
    found: list[dict[str, Any]] = json.loads(
        exiftool(
            "-json",
            "-struct",
            "-n",
            "-G1",
            "-validate",
            "-warning",
            "-a",
            "-xmp:all",
            "-all",
            *map(str, paths),
        )
    )
    return found


@pytest.fixture(params=FORMS)
def edited(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file in which exiftool has written properties of its own."""
    path = tmp_path / f"edited.{request.param.lower()}"
    path.write_bytes(picture(64, 48, form=request.param))
    exiftool(
        "-q",
        "-overwrite_original",
        "-XMP-dc:Rights=Zoë",
        "-XMP-xmp:Rating=5",
        "-XMP-dc:Subject=sea",
        str(path),
    )
    return path


def test_every_mark_is_read(edited: Path, tmp_path: Path) -> None:
    """Source type, model, source and prompt are in their namespaces, beside what was there, without a warning."""
    store, shop = ImageStore(url=str(tmp_path / "store")), ImageStore(url=str(tmp_path / "shop"))
    kind = f"image/{edited.suffix[1:]}"
    image = store.put_image(fresh_image(edited.read_bytes(), kind), {})
    versions = versions_of([Rendition(format=form.lower(), max_size=32, mark="prompt") for form in FORMS])
    delivery = Delivery(
        shop, "{rendition}", "b", datetime.now(UTC), versions=versions, provenance=Provenance()
    )
    copies = delivery.deliver(generation_of(REQUEST, image), {})
    paths = [tmp_path / "shop" / copy.uri.rpartition("/")[2] for copy in copies]
    for copy, found in zip(copies, told(*paths), strict=True):
        assert found["XMP-iptcExt:DigitalSourceType"] == GENERATED
        assert found["XMP-xmp:CreatorTool"] == "gpt-image-2"
        assert found["XMP-xmpMM:DerivedFrom"]["DocumentID"] == f"sha256:{image.sha256}"
        assert found.get("XMP-iptcExt:AIPromptInformation") == (REQUEST.prompt if copy.rendition else None)
        assert (found["XMP-dc:Rights"], found["XMP-xmp:Rating"], found["XMP-dc:Subject"]) == (
            "Zoë",
            5,
            ["sea"],
        )
        assert (found["ExifTool:Validate"], found.get("ExifTool:Warning")) == ("0 0 0", None)


def test_a_file_can_be_edited_further(edited: Path) -> None:
    """exiftool adds to what we wrote; our mark is still read, and taken out without what it added."""
    store = ImageStore(url=str(edited.parent / "store"))
    image = store.put_image(fresh_image(edited.read_bytes(), f"image/{edited.suffix[1:]}"), {})
    delivery = Delivery(store, "copy", "b", datetime.now(UTC), provenance=Provenance())
    delivery.deliver(generation_of(REQUEST, image), {})
    copy = edited.parent / "store" / "copy"
    with copy.open("rb") as file:
        assert b"".join(unmark(file)) == edited.read_bytes()
    exiftool("-q", "-overwrite_original", "-XMP-dc:Title=By hand", str(copy))
    with copy.open("rb") as file:
        labels = read_labels(file) or Labels()
    assert (labels.marks, labels.source_sha256) == (("xmp",), image.sha256)
    (found,) = told(copy)
    assert found["XMP-dc:Title"] == "By hand"
