"""Thumbnails in one file: a zip that everybody can read, and that a later batch trusts no further than it must."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi import ImageStore
from prefect_ttapi.lineage.gallery import LARGEST, ThumbnailFile, ThumbnailPack
from prefect_ttapi.storage.objects import Facts


def name(number: int) -> str:
    return f"{number:064x}"


def webp(number: int, size: int = 40) -> bytes:
    return b"RIFF" + number.to_bytes(4, "little") + b"WEBP" + bytes(size)


def zip_of(count: int) -> bytes:
    with closing(ThumbnailFile()) as thumbnails:
        for number in range(count):
            thumbnails.add(name(number), webp(number))
        with thumbnails.open() as file:
            return file.read()


@given(st.dictionaries(st.integers(0, 300), st.integers(0, 3_000), max_size=40))
def test_everybody_can_read_the_zip(sizes: dict[int, int]) -> None:
    """Whatever thumbnails come, the zip has each under its image's digest, whole, for any reader of zips."""
    with closing(ThumbnailFile()) as thumbnails:
        for number, size in sizes.items():
            thumbnails.add(name(number), webp(number, size))
        assert all(thumbnails.get(name(number)) == webp(number, size) for number, size in sizes.items())
        with thumbnails.open() as file, zipfile.ZipFile(file) as read:
            assert read.testzip() is None
            assert {entry: read.read(entry) for entry in read.namelist()} == {
                f"{name(number)}.webp": webp(number, size) for number, size in sizes.items()
            }
        assert all(thumbnails.get(name(number)) == webp(number, size) for number, size in sizes.items())


@pytest.mark.integration  # seconds of work
def test_more_than_a_plain_zip_may_hold() -> None:
    """Over 65,535 thumbnails are still one zip, and found again."""
    made = zip_of(65_600)
    with zipfile.ZipFile(io.BytesIO(made)) as read:
        assert len(read.namelist()) == 65_600
        assert read.read(f"{name(65_599)}.webp") == webp(65_599)
    pack = ThumbnailPack(io.BytesIO(made))
    assert pack.get(name(65_599)) == webp(65_599)


def test_the_first_thumbnail_of_an_image_stays() -> None:
    """An image that comes again takes no more room; what is too large, or has no digest for a name, is left out."""
    with closing(ThumbnailFile()) as thumbnails:
        for picture in (webp(1), webp(2)):
            thumbnails.add(name(1), picture)
        thumbnails.add(name(3), webp(3, LARGEST))
        thumbnails.add("../../etc/passwd", webp(4))
        thumbnails.add("\ud800" * 64, webp(4))
        assert len(thumbnails) == 1
        assert thumbnails.get(name(1)) == webp(1)
        assert thumbnails.get("../../etc/passwd") is None


@pytest.fixture
def pack(store: ImageStore) -> Iterator[ThumbnailPack]:
    store.objects.write("batches/1/thumbnails.zip", lambda: io.BytesIO(zip_of(3)), Facts("application/zip"))
    pack = ThumbnailPack.of(store, store.uri("batches/1/thumbnails.zip"))
    assert pack is not None
    yield pack
    pack.close()


def test_a_later_batch_finds_them(pack: ThumbnailPack) -> None:
    """A pack in a store gives the thumbnails that it has, and None for others."""
    assert [pack.get(name(number)) for number in range(4)] == [webp(0), webp(1), webp(2), None]
    assert pack.get("not a digest") is None


@pytest.mark.parametrize("bad", [b"", b"PK", zip_of(2)[:-1], b"x" + zip_of(2), bytes(500), b"{}" * 4_000])
def test_what_is_no_pack_is_none(store: ImageStore, bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Another thing under the name, or a part of a pack, is no pack, said in the log; neither is nothing."""
    store.write("thumbnails.zip", bad, "application/zip")
    assert ThumbnailPack.of(store, store.uri("thumbnails.zip")) is None
    assert "can't be used" in caplog.text
    assert ThumbnailPack.of(store, store.uri("nothing.zip")) is None


def test_other_zips_are_none(store: ImageStore) -> None:
    """A zip that somebody else made is not ours, even with the right names in it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as other:
        other.writestr(f"{name(1)}.webp", webp(1))
    store.write("other.zip", made.getvalue(), "application/zip")
    assert ThumbnailPack.of(store, store.uri("other.zip")) is None


@given(st.data())
def test_damage_is_never_shown(data: st.DataObject) -> None:
    """Whatever byte of a pack is changed, each thumbnail is what it was or None, and nothing breaks."""
    made = bytearray(zip_of(3))
    for _ in range(data.draw(st.integers(1, 3))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    try:
        pack = ThumbnailPack(io.BytesIO(bytes(made)))
    except ValueError:
        return
    assert all(pack.get(name(number)) in (webp(number), None) for number in range(3))


def test_what_is_no_webp_is_none() -> None:
    """An entry that holds something else than a WebP, however well packed, is not given out."""
    with closing(ThumbnailFile()) as thumbnails:
        thumbnails.add(name(1), b"<svg onload=alert(1)>")
        with closing(ThumbnailPack(thumbnails.open())) as pack:
            assert pack.get(name(1)) is None
