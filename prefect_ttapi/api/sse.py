"""Server-sent events as the WHATWG frames them, in pieces (sans-IO).

An event's data is handed on as it arrives, so that an event of 64 MiB costs no memory here. Lines end with
LF, CR or CRLF; one byte-order mark is skipped; comments, `id`, `retry` and unknown fields mean nothing to
us. Data stays bytes: whoever reads it knows its encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_BOM: Final = b"\xef\xbb\xbf"
_DATA: Final = b"data:"
_LONGEST_FIELD: Final = 1024  # bytes of a line other than data that are looked at


@dataclass(frozen=True)
class EventEnd:
    """The end of an event, whose data are the pieces since the last one.

    Attributes:
        name: its `event` field, empty where it had none.
    """

    name: str


class EventStream:
    r"""Splits a stream into events. For each event come the pieces of its data, then its `EventEnd`.

    >>> stream = EventStream()
    >>> list(stream.feed(b"event: hi\ndata: on")) + list(stream.feed(b"e\r\ndata:two\r\n\r\n"))
    [b'on', b'e', b'\n', b'two', EventEnd(name='hi')]
    """

    def __init__(self) -> None:
        self._line = b""  # the start of a line that is not known to be data
        self._in_data = False
        self._space_may_come = False
        self._after_cr = False
        self._first_line = True
        self._has_data = False
        self._name = ""

    def feed(self, chunk: bytes) -> Iterator[bytes | EventEnd]:
        """Take the next piece of the stream, of any size."""
        start, line_feed = 0, -2
        if self._after_cr and chunk:
            start = int(chunk.startswith(b"\n"))
            self._after_cr = False
        while start < len(chunk):
            if line_feed != -1 and line_feed < start:
                line_feed = chunk.find(b"\n", start)
            end = chunk.find(b"\r", start, None if line_feed < 0 else line_feed)
            end = line_feed if end < 0 else end
            if end < 0:
                yield from self._take(chunk[start:])
                return
            yield from self._take(chunk[start:end])
            yield from self._end_line()
            start = end + 1
            if chunk[end:start] == b"\r":
                self._after_cr = start == len(chunk)
                start += chunk.startswith(b"\n", start)

    def finish(self) -> Iterator[EventEnd]:
        """Tell that the stream is over.

        The rules drop an event without the empty line that ends it. Here it is up to its data whether it is
        whole: it may be a paid image.
        """
        if self._has_data:
            yield EventEnd(self._name)

    def _take(self, piece: bytes) -> Iterator[bytes]:
        """Hand on a piece of a line, once the line is known to be data."""
        if not self._in_data:
            self._line += piece
            if self._first_line and len(self._line) >= len(_BOM):
                self._line = self._line.removeprefix(_BOM)
                self._first_line = False
            if not self._line.startswith(_DATA):
                self._line = self._line[:_LONGEST_FIELD]
                return
            yield from self._start_data()
            piece = self._line[len(_DATA) :]
        if self._space_may_come and piece:
            piece = piece.removeprefix(b" ")
            self._space_may_come = False
        if piece:
            yield piece

    def _start_data(self) -> Iterator[bytes]:
        if self._has_data:
            yield b"\n"
        self._has_data = self._in_data = self._space_may_come = True

    def _end_line(self) -> Iterator[bytes | EventEnd]:
        line = b"" if self._in_data else self._line
        if line == b"data":
            yield from self._start_data()
        elif line.startswith(b"event:"):
            self._name = line[len(b"event:") :].removeprefix(b" ").decode(errors="replace")
        elif line == b"event":
            self._name = ""
        elif not line and not self._in_data:
            if self._has_data:
                yield EventEnd(self._name)
            self._name, self._has_data = "", False
        self._line, self._in_data, self._first_line = b"", False, False
