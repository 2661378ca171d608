"""What a store holds that nobody needs: shown first, and deleted only when that is wanted."""

from __future__ import annotations

import logging

import pytest

from prefect_ttapi.cli.main import main
from prefect_ttapi.generation.rescue import Read, RescueFolder
from prefect_ttapi.ledger.documents import Answer, facts_of_generation
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.results import Generation
from prefect_ttapi.storage.store import ImageStore
from tests.cli.test_batches import batch
from tests.support.damaged_stores import age, claimed, image_key, paid
from tests.support.generations import API, fresh_image, generation_of, request_of
from tests.support.ledgers import recorded
from tests.support.rows import picture

ORPHAN = f"images/{64 * '0'}.png"


def rescue(folder: RescueFolder, prompt: str, data: bytes) -> Generation:
    """An answer that is both in the store and in the rescue folder."""
    request = request_of(prompt)
    with claimed(folder.store, prompt) as claim:
        claim.before_sending()
        image = folder.store.put_image(fresh_image(data), {"request-hash": request.request_hash})
        made = recorded(claim, generation_of(request, image)).generation
    answer = Answer(token="t", run_id="r", generation=facts_of_generation(made))
    folder.put(request.request_hash, Read(answer, (fresh_image(data),)))
    return made


def files(store: ImageStore) -> set[str]:
    return {listed.key for listed in store.list("")} - {"ledger/probe.json"}


@pytest.fixture
def used(store: ImageStore) -> ImageStore:
    """A store with an old and a young batch of the same image, parts that were left, and an orphan."""
    made = paid(store, "a meadow")
    old, young = batch(store, "old", Row.of(0, made)), batch(store, "young", Row.of(0, made, "cached"))
    for key in (f"{old}/manifest.jsonl", f"{old}/index.html"):
        age(store, key, 100 * 86_400)
    for key in (f"{young}/manifest.jsonl", f"{young}/index.html", f"{young}/parts/000001.jsonl", ORPHAN):
        if not (key.endswith("l") and "parts" not in key):
            store.write(key, b"x", "image/png")
        age(store, key)
    return store


def test_nothing_is_deleted_unasked(used: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal to ask at, and without --yes, it is only shown."""
    before = files(used)
    assert main(["gc", used.url, "--older-than", "90d"]) == 0
    told = capsys.readouterr().out
    assert "Files of old batches: 2" in told
    assert "batches/old/manifest.jsonl" in told
    assert ORPHAN in told
    assert "Nothing was deleted" in told
    assert files(used) == before


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ((), {"old", "young"}),
        (("--older-than", "90d"), {"young"}),
        (("--keep", "1"), {"young"}),
        (("--keep", "1", "--older-than", "200d"), {"old", "young"}),
        (("--keep", "0"), set()),
    ],
)
def test_what_is_old_goes_as_it_is_said(words: tuple[str, ...], kept: set[str], used: ImageStore) -> None:
    """Orphans and parts go in any case; images that were paid for, and their records, never do."""
    paid_for = {key for key in files(used) if key.startswith(("images/", "ledger/")) and key != ORPHAN}
    assert main(["gc", used.url, "--yes", *words]) == 0
    left = files(used)
    assert {key.split("/")[1] for key in left if key.startswith("batches/")} == kept
    assert {key for key in left if not key.startswith("batches/")} == paid_for
    assert not any("/parts/" in key for key in left)


def test_what_is_young_or_named_stays(store: ImageStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody may be about to record an image that is an hour old at most, and to write rows."""
    made = paid(store, "a meadow")
    age(store, image_key(made))
    batch(store, "running", Row.of(0, made))
    store.write("batches/running/parts/000001.jsonl", b"x", "application/x-ndjson")
    store.write(ORPHAN, b"x", "image/png")
    before = files(store)
    assert main(["gc", store.url, "--yes"]) == 0
    assert "holds nothing that is not needed" in capsys.readouterr().out
    assert files(store) == before


def test_the_rescue_folder_keeps_what_the_store_has_not(
    store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that waits for the store stays; one that the store has goes."""
    folder = RescueFolder(store, API, logging.getLogger())
    rescued = [
        rescue(folder, prompt, picture(mode=mode)) for prompt, mode in (("a meadow", "RGB"), ("a storm", "L"))
    ]
    store.remove(image_key(rescued[1]))
    assert main(["gc", store.url, "--yes"]) == 0
    assert "1 answer in the rescue folder" in capsys.readouterr().out
    assert [*folder.requests()] == [rescued[1].request_hash]


@pytest.mark.parametrize("words", [("--older-than", "soon"), ("--keep", "-1")])
def test_what_is_old_must_be_said_clearly(
    words: tuple[str, ...], store: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gc", store.url, *words]) == 2
    assert words[0] in capsys.readouterr().err
