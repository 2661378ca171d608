"""The framing of server-sent events, against the rules and against httpx-sse."""

from __future__ import annotations

import codecs
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from itertools import chain, pairwise, repeat

import pytest
from httpx_sse._decoders import SSEDecoder, SSELineDecoder
from hypothesis import example, given
from hypothesis import strategies as st

from prefect_ttapi.api.answers import EventEnd, framed

Event = tuple[str, bytes]


def events(chunks: Iterable[bytes]) -> list[Event]:
    """Name and data of each event."""
    found, data = [], b""
    for part in framed(chunks):
        if isinstance(part, EventEnd):
            found.append((part.name, data))
            data = b""
        else:
            data += part
    return found


LAWS: dict[str, tuple[bytes, list[Event]]] = {
    "LF": (b"data: a\n\n", [("", b"a")]),
    "CR": (b"data: a\r\r", [("", b"a")]),
    "CRLF": (b"data: a\r\n\r\n", [("", b"a")]),
    "mixed": (b"data: a\r\rdata: b\n\r\ndata: c\r\n\n", [("", b"a"), ("", b"b"), ("", b"c")]),
    "several lines": (b"data: a\ndata: b\ndata:c\n\n", [("", b"a\nb\nc")]),
    "several lines, CRLF": (b"event: x\r\ndata: a\r\ndata: b\r\n\r\n", [("x", b"a\nb")]),
    "name": (b"event: x\ndata: a\n\ndata: b\n\n", [("x", b"a"), ("", b"b")]),
    "name after data": (b"data: a\nevent: x\n\n", [("x", b"a")]),
    "last name counts": (b"event: x\nevent:y\ndata: a\n\n", [("y", b"a")]),
    "empty name": (b"event: x\nevent\ndata: a\n\n", [("", b"a")]),
    "comments": (b": hi\n:\ndata: a\n:data: b\n\n", [("", b"a")]),
    "other fields": (b"id: 1\nretry: 5\nfoo: bar\nfoo\ndata: a\n\n", [("", b"a")]),
    "one space": (b"data:  a \n\n", [("", b" a ")]),
    "no space": (b"data:a:b\n\n", [("", b"a:b")]),
    "empty data": (b"data:\n\n", [("", b"")]),
    "only the field": (b"data\n\n", [("", b"")]),
    "two empty lines of data": (b"data\ndata:\n\n", [("", b"\n")]),
    "no data": (b"event: x\n\ndata: a\n\n", [("", b"a")]),
    "field names are exact": (b"Data: a\n data: b\ndata : c\ndatas: d\n\n", []),
    "byte-order mark": (b"\xef\xbb\xbfdata: a\n\n", [("", b"a")]),
    "byte-order mark, twice": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
    "byte-order mark, later": (b"\n\xef\xbb\xbfdata: a\n\n", []),
    "byte-order mark, alone": (b"\xef\xbb\xbf\ndata: a\n\n", [("", b"a")]),
    "multi-byte": ("event: ü\ndata: 🐞\n\n".encode(), [("ü", "🐞".encode())]),
    "other line ends are text": ("data: a\u2028b\x0bc\x85\n\n".encode(), [("", "a\u2028b\x0bc\x85".encode())]),
    "no UTF-8": (b"event: \xff\ndata: \xff\n\n", [("\ufffd", b"\xff")]),
    "no empty line at the end": (b"data: a\n\ndata: b\n", [("", b"a"), ("", b"b")]),
    "no end of the line": (b"event: x\ndata: a", [("x", b"a")]),
    "no data before the end": (b"data: a\n\nevent: x\n", [("", b"a")]),
    "nothing": (b"", []),
}  # fmt: skip


@pytest.mark.parametrize(("stream", "expected"), LAWS.values(), ids=LAWS)
def test_the_rules_hold_wherever_the_stream_is_split(stream: bytes, expected: list[Event]) -> None:
    """The same events come of the whole stream, of its two parts at every cut, and of its single bytes."""
    assert events([stream]) == expected
    assert events(stream[i : i + 1] for i in range(len(stream))) == expected
    for cut in range(len(stream) + 1):
        assert events([stream[:cut], b"", stream[cut:]]) == expected


LINES = st.one_of(
    st.sampled_from(["data", "data:", "data: ", "event: x", "event", ":", "id: 1", "retry: 3", "", "", ""]),
    st.tuples(
        st.sampled_from(["data:", "data: ", "event: ", ":", "id:", "dat", "data", "x"]),
        st.text(st.sampled_from('ab: \u2028\x0b\x1c\x850{}"🐞é'), max_size=6),
    ).map("".join),
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r", "\r\n"])).map("".join), max_size=20)


def theirs(chunks: list[bytes]) -> list[Event]:
    text, lines, decoder = codecs.getincrementaldecoder("utf-8")(), SSELineDecoder(), SSEDecoder()
    found = [
        decoder.decode(line) for chunk in chunks if (t := text.decode(chunk)) for line in lines.decode(t)
    ]
    found += [decoder.decode(line) for line in lines.flush()]
    return [(event.event, event.data.encode()) for event in found if event is not None]


@example(["data: a\r", "\r"], [3, 9])
@given(STREAMS, st.lists(st.integers(0, 200), max_size=12))
def test_the_same_events_as_httpx_sse(lines: list[str], cuts: list[int]) -> None:
    """Our decoder and httpx-sse's read any stream alike, in any pieces.

    Events without data are left out: httpx-sse tells of them, the rules don't. Of a last event without its empty line
    it is the other way round, so there is one.
    """
    stream = "".join(lines).encode() + b"\n\n"
    places = [0, *sorted(cuts), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(places)]
    ours = [(name or "message", data) for name, data in events(chunks) if data]
    assert ours == [(name, data) for name, data in theirs(chunks) if data]


def test_a_large_event_is_never_held() -> None:
    """64 MiB of one event, and as much of a comment, pass through in the memory of a few chunks."""
    chunk = b"x" * 65536
    stream = chain([b"data: "], repeat(chunk, 1024), [b"\n:"], repeat(chunk, 1024), [b"\n\n"])
    tracemalloc.start()
    lengths = Counter[type]()
    for part in framed(stream):
        lengths[type(part)] += len(part) if isinstance(part, bytes) else 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == {bytes: 64 * 1024**2, EventEnd: 1}
    assert peak < 1_000_000
