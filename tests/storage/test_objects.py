"""What every kind of store must do alike."""

from __future__ import annotations

import hashlib
import io
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.storage.objects import Condition, ConflictError, Facts, ObjectStore, checked_key
from prefect_ttapi.storage.store import ImageStore

JSON = Facts("application/json")


@pytest.fixture
def objects(store: ImageStore) -> ObjectStore:
    return store.objects


def put(objects: ObjectStore, key: str, data: bytes, expected: Condition | str = Condition.ANYTHING) -> str:
    return objects.write(key, lambda: io.BytesIO(data), JSON, expected)


def test_reads_back_what_was_written(objects: ObjectStore) -> None:
    """An object is its bytes, under its key, with the tag of its write, and has its length."""
    tag = put(objects, "a/b.json", b"one")
    assert objects.read("a/b.json") == (b"one", tag)
    with objects.fetch("a/b.json")() as reader:
        assert reader.read() == b"one"
    assert objects.sizes(["a/b.json", "a/c.json"]) == [3, None]
    found = objects.look("a/b.json")
    assert found is not None
    assert (found.size, found.tag) == (3, tag)


def test_a_missing_object_is_no_failure(objects: ObjectStore) -> None:
    """What is not there reads as None; only a caller that needs the bytes gets an error."""
    assert objects.read("none") is None
    assert objects.look("none") is None
    with pytest.raises(ImageMissingError, match="there is no"):
        objects.fetch("none")


def test_writing_replaces_whole_objects(objects: ObjectStore) -> None:
    """An unconditional write replaces, a shorter object leaves nothing of a longer one."""
    put(objects, "key", b"a long object")
    put(objects, "key", b"short")
    assert objects.read("key")[0] == b"short"


def test_creates_once(objects: ObjectStore) -> None:
    """A second create is refused and changes nothing."""
    put(objects, "key", b"first", Condition.NOTHING)
    with pytest.raises(ConflictError):
        put(objects, "key", b"second", Condition.NOTHING)
    assert objects.read("key")[0] == b"first"


def test_replaces_only_what_was_seen(objects: ObjectStore) -> None:
    """A write that expects a tag succeeds on exactly that object: not on a later one, nor on none."""
    first = put(objects, "key", b"1", Condition.NOTHING)
    second = put(objects, "key", b"2", first)
    assert second != first
    for stale in (first, "0" * 32):
        with pytest.raises(ConflictError):
            put(objects, "key", b"3", stale)
    with pytest.raises(ConflictError):
        put(objects, "another key", b"3", second)
    assert objects.read("key") == (b"2", second)


def test_one_of_many_creators_wins(objects: ObjectStore) -> None:
    """Of 8 threads that create the same object at once, one succeeds, and its bytes stand."""

    def create(key: str, number: int) -> bool:
        try:
            put(objects, key, b"%d" % number, Condition.NOTHING)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        for round_ in range(5):
            key = f"race-{round_}"
            won = list(threads.map(lambda number, key=key: create(key, number), range(8)))
            assert sum(won) == 1
            assert objects.read(key)[0] == b"%d" % won.index(True)


def test_no_update_is_lost(objects: ObjectStore) -> None:
    """Counting up by read and conditional write from 4 threads misses no step."""
    put(objects, "count", b"0", Condition.NOTHING)

    def count_up() -> None:
        while True:
            data, tag = objects.read("count")
            try:
                put(objects, "count", b"%d" % (int(data) + 1), tag)
            except ConflictError:
                continue
            return

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(count_up) for _ in range(40)]:
            done.result()
    assert objects.read("count")[0] == b"40"


def test_deletes_one_object(store: ImageStore, objects: ObjectStore) -> None:
    """What is deleted is gone, its neighbour is not, and deleting what is not there succeeds."""
    put(objects, "a/b", b"1")
    put(objects, "a/b.c", b"2")
    for _ in range(2):
        store.remove("a/b")
    assert objects.sizes(["a/b", "a/b.c"]) == [None, 1]


def test_tells_the_digest(objects: ObjectStore) -> None:
    """Length and SHA-256 are those of the bytes that are there; of none where nothing is."""
    data = b"pixels" * 100_000
    put(objects, "a/b", data)
    assert objects.digest("a/b") == (len(data), hashlib.sha256(data).hexdigest())
    assert objects.digest("a/c") is None


def test_lists_by_prefix(objects: ObjectStore) -> None:
    """A listing gives key, size and current tag of what starts with the prefix, and nothing else."""
    tags = {key: put(objects, key, b"x" * size) for size, key in enumerate(["a/1", "a/2", "a/deep/3", "b/1"])}
    assert {(found.key, found.size, found.tag) for found in objects.list("a/")} == {
        ("a/1", 0, tags["a/1"]),
        ("a/2", 1, tags["a/2"]),
        ("a/deep/3", 2, tags["a/deep/3"]),
    }
    assert all(abs(found.modified - time.time()) < 60 for found in objects.list("a/"))
    assert {found.key for found in objects.list("")} == set(tags)
    assert [found.key for found in objects.list("a/de")] == ["a/deep/3"]
    assert list(objects.list("none/")) == []


def test_addresses_lead_back_to_keys(objects: ObjectStore) -> None:
    """A key's address gives the key again, and no other place's address is taken for one of this place."""
    for key in ("a/b.png", "a b+c~=.png", "größe/灯台.png", "50%25.png"):
        assert objects.key(objects.uri(key)) == key
    for foreign in ("s3://elsewhere/a.png", "file:///etc/passwd", "https://example.com/a.png", "a.png"):
        with pytest.raises(StoreError, match="is not in"):
            objects.key(foreign)
    with pytest.raises(StoreError):
        objects.key(objects.uri("a").rpartition("/")[0] + "/../../etc/passwd")


NO_KEYS = [
    *["", "/a", "a//b", "../a", "a/../b", "a/..", ".", "a/./b", "a/"],
    *["a\nb", "a\x00b", "a\\b", "\ud800", "a\u202eb"],
    *["x" * 1025, "ü" * 513, "a/.lock", ".tmp-abc", ".metadata/a.png.json"],
]


@pytest.mark.parametrize("key", NO_KEYS)
def test_hostile_keys_are_refused(objects: ObjectStore, key: str) -> None:
    """A key that could leave the store, or that some store can't hold, is refused before anything is done."""
    with pytest.raises(StoreError, match="can't be used"):
        put(objects, key, b"x")
    with pytest.raises(StoreError, match="can't be used"):
        objects.uri(key)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "b c", "\\", "~"])).map("/".join))
def test_no_key_leads_outside(folder_store: ImageStore, key: str) -> None:
    """Whatever text is used as a key, it is refused or names a file below the store's folder."""
    try:
        checked_key(key)
    except StoreError:
        return
    root = folder_store.uri("x")[: -len("x")]
    assert folder_store.uri(key).startswith(root)
    assert "/../" not in folder_store.uri(key)
    assert folder_store.objects.key(folder_store.uri(key)) == key
