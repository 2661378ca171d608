"""No image is put where another one is to be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.storage.objects import TakenKeys

#: Short names that often clash, in case or as a file where a folder must be.
KEYS = st.lists(st.sampled_from("aAbB"), min_size=1, max_size=3).map("/".join)


def clash(one: str, other: str) -> bool:
    a, b = one.lower(), other.lower()
    return a == b or a.startswith(b + "/") or b.startswith(a + "/")


@given(st.lists(KEYS, max_size=7))
def test_exactly_what_clashes_is_refused(keys: list[str]) -> None:
    """A key is refused exactly if it and one that was taken can't both be files of a folder that ignores case."""
    taken, book = [], TakenKeys()
    for row, key in enumerate(keys):
        problem = book.take(key, f"image {row}", row)
        assert bool(problem) == any(clash(key, other) for other in taken)
        if problem is None:
            taken.append(key)


@given(KEYS)
def test_the_same_image_may_have_its_key_again(key: str) -> None:
    """A duplicate of a request is delivered under the same key, which is no clash; another image's is."""
    book = TakenKeys()
    assert book.take(key, "image", 0) is None
    assert book.take(key, "image", 1) is None
    assert book.take(key, "other", 2) is not None


def test_a_refused_key_takes_nothing() -> None:
    """What a refused key would have needed stays free for others."""
    book = TakenKeys()
    assert book.take("a", "one", 0) is None
    assert book.take("a/b/c", "two", 1) == "its key a/b/c needs a folder where request 0 has an image"
    assert book.take("A/B", "three", 2) is not None
    assert book.take("b", "four", 3) is None


def test_keys_that_get_along_are_taken() -> None:
    """Different keys, also in one folder or with one's name in another's, are no clash."""
    book = TakenKeys()
    keys = ["a/b", "a/c", "ab", "b", "a-b/c", "a.b"]
    assert [book.take(key, key, row) for row, key in enumerate(keys)] == [None] * len(keys)
