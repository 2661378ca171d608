"""An image's bytes between the wire and the store: in memory or in a file, the same to every reader."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.images.spool import IN_MEMORY, Spool


def spool_of(data: bytes, chunk: int = 0) -> Spool:
    spool = Spool()
    step = chunk or len(data) or 1
    for start in range(0, len(data), step):
        spool.write(data[start : start + step])
    return spool


def files_open() -> int:
    """How many temporary files this process holds open: a spool's have no name."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(fd.readlink()))
        except FileNotFoundError:  # the listing's own
            continue
    return sum("(deleted)" in link for link in links)


@pytest.fixture
def no_leak() -> Iterator[None]:
    before = files_open()
    yield
    assert files_open() == before


SIZES = [0, 1, IN_MEMORY - 1, IN_MEMORY, IN_MEMORY + 1, 3 * IN_MEMORY + 7]


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("chunk", [0, 1000, 4096, IN_MEMORY])
@pytest.mark.parametrize("size", SIZES)
def test_what_goes_in_comes_out(size: int, chunk: int) -> None:
    """On either side of the border to a file, every way of reading gives the bytes that were written."""
    data = random.Random(size).randbytes(size)  # noqa: S311 - test data
    spool = spool_of(data, chunk)
    assert spool.size_bytes == size
    assert spool.sha256 == hashlib.sha256(data).hexdigest()
    assert spool.read_bytes() == data
    with spool.open() as reader:
        assert reader.read() == data
        assert reader.read() == b""


@pytest.mark.usefixtures("no_leak")
def test_small_images_take_no_file() -> None:
    """Up to IN_MEMORY bytes nothing is opened; one byte more takes one file, however many chunks follow."""
    before = files_open()
    spool = spool_of(b"x" * IN_MEMORY, 1000)
    assert files_open() == before
    spool.write(b"y")
    assert files_open() == before + 1
    spool.write(b"z" * 10_000)
    assert files_open() == before + 1
    assert spool.read_bytes() == b"x" * IN_MEMORY + b"y" + b"z" * 10_000


@given(
    st.lists(st.binary(max_size=50), max_size=20),
    st.integers(0, 3),
    st.integers(0, 200),
)
def test_heads_and_parts(pieces: list[bytes], files: int, size: int) -> None:
    """head and read_at give what slices of the whole would give, in memory and in a file."""
    data = b"".join(pieces)
    spool = spool_of(b"a" * (IN_MEMORY if files else 0))
    for piece in pieces:
        spool.write(bytearray(piece) if files % 2 else memoryview(piece))
    whole = b"a" * (IN_MEMORY if files else 0) + data
    assert spool.read_bytes() == whole
    assert spool.head(size) == whole[:size]
    assert spool.read_at(size, 30) == whole[size : size + 30]


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("size", [1000, 3 * IN_MEMORY])
def test_readers_move_by_themselves(size: int) -> None:
    """Each reader has a position of its own and seeks and tells like a file."""
    data = random.Random(7).randbytes(size)  # noqa: S311 - test data
    spool = spool_of(data)
    with spool.open() as one, spool.open() as two, io.BytesIO(data) as model:
        assert one.read(10) == data[:10]
        assert two.read(3) == data[:3]
        for offset, whence in [(0, 0), (500, 0), (-5, 1), (7, 1), (-100, 2), (0, 2), (50, 2), (0, 0)]:
            assert one.seek(offset, whence) == model.seek(offset, whence)
            assert one.tell() == model.tell()
            assert one.read(17) == model.read(17)
        assert two.read(4) == data[3:7]
        assert one.readable()
        assert one.seekable()
        assert not one.writable() or size <= IN_MEMORY


@pytest.mark.usefixtures("no_leak")
def test_many_threads_read_at_once() -> None:
    """32 threads that read different places of one spool at the same time each get their own bytes."""
    data = random.Random(3).randbytes(2 * 1024 * 1024)  # noqa: S311 - test data
    spool = spool_of(data, 100_000)
    start = threading.Barrier(32)

    def read(seed: int) -> bool:
        places = random.Random(seed)  # noqa: S311 - test data
        start.wait()
        with spool.open() as reader:
            for _ in range(50):
                at = places.randrange(len(data))
                reader.seek(at)
                if reader.read(5000) != data[at : at + 5000]:
                    return False
        return spool.read_bytes() == data

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(read, range(32)))


@pytest.mark.usefixtures("no_leak")
def test_what_is_written_can_be_read_while_more_is() -> None:
    """A thread that reads what was written so far gets all of it, also while the spool moves into a file."""
    spool = Spool()
    wrong: list[int] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            size = spool.size_bytes  # written or about to be
            settled = max(0, size - 1_000)
            if len(spool.read_at(0, settled)) != settled:
                wrong.append(settled)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(200):
        spool.write(b"x" * 1_000)
    ended.set()
    reader.join()
    assert not wrong


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("size", [10, 3 * IN_MEMORY])
def test_a_reader_outlives_its_spool(size: int) -> None:
    """A reader is good after the spool is forgotten, and the file goes with the last of them."""
    before = files_open()
    spool = spool_of(b"r" * size)
    readers = [spool.open() for _ in range(3)]
    del spool
    readers.pop().close()
    assert [len(reader.read()) for reader in readers] == [size, size]
    for reader in readers:
        reader.close()
    del reader, readers
    assert files_open() == before


@pytest.mark.usefixtures("no_leak")
def test_forgotten_spools_leave_nothing() -> None:
    """300 spools and readers that nobody closes are closed by being forgotten."""
    for _ in range(300):
        spool_of(b"x" * (IN_MEMORY + 1)).open().read(1)


def test_spools_have_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary folder stays empty while a spool has its file there, so a kill leaves nothing."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = files_open()
    spool = spool_of(b"x" * (IN_MEMORY + 1))
    assert files_open() == before + 1
    assert list(tmp_path.iterdir()) == []
    assert spool.size_bytes == IN_MEMORY + 1
