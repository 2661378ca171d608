"""What is particular to local folders: files whole or absent, races between processes, what can go wrong."""

from __future__ import annotations

import errno
import io
import os
import time
from pathlib import Path

import pytest

from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.delivery import TRIED
from prefect_ttapi.storage.folder import Folder
from prefect_ttapi.storage.objects import Condition, ConflictError, Facts
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import deliver, delivery_to, fresh_image
from tests.support.processes import context, start

FACTS = Facts("application/json")
ROUNDS = 40


def race(root: str, number: int, together: object, wins: object) -> None:
    """Create every round's object, then count up as often; report how many creates were won."""
    folder = Folder(Path(root))
    together.wait()
    won = 0
    for round_ in range(ROUNDS):
        try:
            folder.write(f"round-{round_}", lambda: io.BytesIO(b"%d" % number), FACTS, Condition.NOTHING)
            won += 1
        except ConflictError:
            pass
    done = 0
    while done < ROUNDS:
        data, tag = folder.read("count")
        try:
            folder.write("count", lambda data=data: io.BytesIO(b"%d" % (int(data) + 1)), FACTS, tag)
            done += 1
        except ConflictError:
            pass
    wins.put(won)


def test_processes_race_without_a_second_winner_or_a_lost_update(tmp_path: Path) -> None:
    """Of 4 processes, exactly one creates each object, and conditional counting misses no step."""
    Folder(tmp_path).write("count", lambda: io.BytesIO(b"0"), FACTS)
    together, wins = context.Barrier(4), context.Queue()
    racers = [start(race, str(tmp_path), number, together, wins) for number in range(4)]
    won = [wins.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sum(won) == ROUNDS
    assert Folder(tmp_path).read("count")[0] == b"%d" % (4 * ROUNDS)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_tag_never_comes_back(tmp_path: Path) -> None:
    """Replacing gives a new tag each time, at the same size and also when the clock stands behind."""
    folder = Folder(tmp_path)
    tags = [folder.write("key", lambda: io.BytesIO(b"0"), FACTS, Condition.NOTHING)]
    ahead = time.time_ns() + 3_600_000_000_000
    os.utime(tmp_path / "key", ns=(ahead, ahead))
    tags.append(folder.read("key")[1])
    times = []
    for number in range(50):
        tags.append(folder.write("key", lambda n=number: io.BytesIO(b"%d" % (n % 10)), FACTS, tags[-1]))
        times.append((tmp_path / "key").stat().st_mtime_ns)
    assert len(set(tags)) == len(tags)
    assert times == sorted(set(times))
    assert times[0] > ahead


def test_half_written_files_are_no_objects(tmp_path: Path) -> None:
    """What a killed process left behind is not listed, hinders nobody, and only it can be tidied away."""
    folder = Folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".tmp-00000000deadbeef").write_bytes(b"half")
    (tmp_path / "a" / ".tmp-another-program's").write_bytes(b"theirs")
    folder.write("a/b", lambda: io.BytesIO(b"whole"), FACTS)
    assert [found.key for found in folder.list("")] == ["a/b"]
    assert [(found.key, found.size) for found in folder.half_written()] == [("a/.tmp-00000000deadbeef", 4)]
    for other in ("a/b", "../.tmp-0123456789abcdef"):
        with pytest.raises(StoreError, match="no half-written object"):
            folder.delete_half_written(other)
    folder.delete_half_written("a/.tmp-00000000deadbeef")
    assert list(folder.half_written()) == []


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    """If the bytes can't be read to their end, there is no object and no rest of one."""

    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(StoreError, match=r"can't write .*Input/output error"):
        Folder(tmp_path).write("key", Failing, FACTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["file/store", "/proc/store"])
def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path, below: str) -> None:
    """A folder that can't be made or written to fails the check with the path and what to do."""
    (tmp_path / "file").write_text("in the way")
    store = ImageStore(url=str(tmp_path / below))
    with pytest.raises(StoreError, match=r"can't \w+ /.*: .+") as caught:
        store.check()
    assert "\n" not in str(caught.value)
    assert str(tmp_path / below) in str(caught.value)


def test_a_directory_in_an_objects_place_is_an_error_not_a_miss(tmp_path: Path) -> None:
    """A record that can't be read is never taken for one that is absent."""
    (tmp_path / "ledger.json").mkdir()
    with pytest.raises(StoreError, match="can't read"):
        Folder(tmp_path).read("ledger.json")


def test_a_held_lock_is_waited_for_and_then_reported(tmp_path: Path) -> None:
    """While another process replaces, a writer waits; what was locked is written when it is free again."""
    import fcntl
    import threading

    folder = Folder(tmp_path)
    tag = folder.write("key", lambda: io.BytesIO(b"1"), FACTS, Condition.NOTHING)
    with (tmp_path / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = threading.Thread(
            target=folder.write, args=("key", lambda: io.BytesIO(b"2"), FACTS, tag), daemon=True
        )
        writer.start()
        writer.join(0.1)
        assert writer.is_alive()
        assert folder.read("key")[0] == b"1"
    writer.join()
    assert folder.read("key")[0] == b"2"


def test_an_image_in_a_folder_knows_what_it_would_on_s3(folder_store: ImageStore) -> None:
    """Kept and delivered images have the metadata that S3 would keep, in a hidden folder that no listing shows."""
    image = folder_store.put_image(fresh_image(b"pixels"), {"prompt": "Zoë"})
    deliver(folder_store, image, "shop/a.png", metadata={"model": "dall-e-2"})
    folder_store.write("manifest.jsonl", b"{}", "application/jsonl")
    look = folder_store.objects.look
    assert look(f"images/{image.sha256}.png").metadata == {"prompt": "Zo%C3%AB", "sha256": image.sha256}
    assert look("shop/a.png").metadata == {"model": "dall-e-2", "sha256": image.sha256}
    root = Path(folder_store.url)
    assert sorted(path.relative_to(root).as_posix() for path in (root / ".metadata").rglob("*.json")) == [
        f".metadata/images/{image.sha256}.png.json",
        ".metadata/shop/a.png.json",
    ]
    assert len(list(folder_store.list(""))) == 3
    assert [path.name for path in root.rglob("*.png") if path.is_file()].count("a.png") == 1
    folder_store.remove("shop/a.png")
    assert not (root / ".metadata" / "shop" / "a.png.json").exists()


def test_metadata_never_speaks_of_another_object(tmp_path: Path) -> None:
    """What was known of an object says nothing of the one that replaced it; what is damaged says nothing at all."""
    folder = Folder(tmp_path)
    image = Facts("image/png", metadata={"sha256": "ab"})
    folder.write("a.png", lambda: io.BytesIO(b"one"), image)
    assert folder.look("a.png").metadata == {"sha256": "ab"}
    (tmp_path / "a.png").write_bytes(b"edited by hand")
    assert folder.look("a.png").metadata == {}
    folder.write("a.png", lambda: io.BytesIO(b"two"), image)
    for nonsense in (b"", b"{", b"[]", b'{"tag": 1}', b"\xff", b"[" * 100_000):
        (tmp_path / ".metadata" / "a.png.json").write_bytes(nonsense)
        assert folder.look("a.png").metadata == {}


def test_without_hard_links_a_folder_is_no_store_but_takes_deliveries(
    tmp_path: Path,
    folder_store: ImageStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a memory stick nobody can win a race for sure: it is refused as a store, and a look does for deliveries."""
    image = folder_store.put_image(fresh_image(b"pixels"), {})

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    stick = ImageStore(url=str(tmp_path / "stick"))
    with pytest.raises(
        StoreError, match=r"no conditional writes \(the file system at .* has no hard links\)"
    ):
        stick.check()
    delivery_to(stick).check()
    deliver(stick, image, "a.png", folder_store)
    assert stick.read("a.png") == b"pixels"
    assert [
        record.getMessage() for record in caplog.records if "has no hard links" in record.getMessage()
    ] == [
        f"{stick.identity}: no conditional writes there (the file system at {tmp_path / 'stick' / TRIED} has no hard "
        "links): a look before each delivery does instead, which misses what others write at the same moment"
    ]


def test_a_listing_looks_at_nothing_but_what_it_is_asked_for(tmp_path: Path) -> None:
    """What else is in a shared folder, readable or not, neither fails nor slows the search for a few keys."""
    folder = Folder(tmp_path)
    for key in ("shop/cat-1.png", "shop/cat-2/a.png", "shop/cats/b.png", "shop/dog/c.png"):
        folder.write(key, lambda: io.BytesIO(b"x"), FACTS)
    (tmp_path / "shop" / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match="can't list"):
        list(folder.list("shop/"))
    assert sorted(found.key for found in folder.list("shop/cat-")) == ["shop/cat-1.png", "shop/cat-2/a.png"]
    assert [found.key for found in folder.list("shop/dog/")] == ["shop/dog/c.png"]
