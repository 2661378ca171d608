"""Streaming JSON: the answer of json.loads and b64decode, at every chunk boundary, in bounded memory."""

from __future__ import annotations

import base64
import gc
import json
import os
import re
import tracemalloc
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefect_ttapi.api import json_stream
from prefect_ttapi.api.json_stream import BASE64_KEYS, SLICE, DecodingError, EarlyEnd, StreamingJSON
from prefect_ttapi.images.spool import Spool


def decode(chunks: Iterable[bytes], **options: Any) -> Any:
    """The one document of a body."""
    found, *wrong = documents(chunks, **options)
    if wrong[0] is not None:
        raise wrong.pop()  # no variable keeps it, and this frame, alive
    (document,) = found
    return document


def documents(chunks: Iterable[bytes], **options: Any) -> tuple[list[Any], DecodingError | None]:
    decoder = StreamingJSON(**options)
    for chunk in chunks:
        decoder.feed(chunk)
    return decoder.finish()


def in_memory(document: Any) -> Any:
    """The document with bytes in the place of spools."""
    match document:
        case Spool():
            return document.read_bytes()
        case DecodingError():
            return None
        case dict():
            return {key: in_memory(value) for key, value in document.items()}
        case list():
            return [in_memory(value) for value in document]
        case _:
            return document


class Pairs(list[tuple[str, Any]]):
    """An object as json.loads saw it, with its duplicates."""


def undressed(text: str) -> bytes | None:
    """The bytes of base64 in any dress, the plain way; None where it is none."""
    text = re.sub(r"^\s*data:[^,]{0,150};\s*base64\s*,", "", text, flags=re.IGNORECASE | re.ASCII)
    meant = {"n": "", "r": "", "t": "", "b": "?", "f": "?"}
    text = re.sub(
        r"%([0-9A-Fa-f]{2})|\\(.)", lambda m: chr(int(m[1], 16)) if m[1] else meant.get(m[2], m[2]), text
    )
    text = re.sub(r"(?:%[0-9A-Fa-f]?|\\)\Z", "", text)
    parts = re.sub(r"[ \t\r\n]", "", text).replace("-", "+").replace("_", "/").split("=")
    if not re.fullmatch("[A-Za-z0-9+/]*", "".join(parts)):
        return None
    try:
        whole = [part[:-1] if len(part) % 4 == 1 else part for part in parts]
        return b"".join(base64.b64decode(part + "=" * (-len(part) % 4), validate=True) for part in whole)
    except ValueError:
        return None


def is_image(text: str, key: str) -> bool:
    if re.match(r"\s*data:[^,]{0,150};\s*base64\s*,|\s*(?:iVBORw0KGgo|[/_]9j[/_]|R0lGOD)", text, re.ASCII):
        return True
    named = key.lower().replace("_", "").replace("-", "") in BASE64_KEYS
    is_url = re.match(r"[\s\"'`<]*[a-z][a-z0-9+.-]{0,20}:", text, re.IGNORECASE | re.ASCII)
    return named and bool(text.encode(errors="replace").strip()) and not is_url


def with_bytes(value: Any, key: str = "") -> Any:
    match value:
        case str():
            return undressed(value) if is_image(value, key) else value
        case Pairs():
            return {name: with_bytes(item, name) for name, item in value}
        case list():
            return [with_bytes(item, key) for item in value]
        case _:
            return value


def refuse(word: str) -> None:
    raise ValueError(word)


def plainly(body: bytes) -> str | None:
    """What json and b64decode make of it, as text that tells 1 from True and 1.0; None if refused."""
    decoder = json.JSONDecoder(object_pairs_hook=Pairs, parse_constant=refuse, strict=False)
    text = body.decode("utf-8-sig", errors="replace").lstrip(" \t\r\n\x1e")
    found = []
    try:
        while text:
            document, end = decoder.raw_decode(text)
            found.append(with_bytes(document))
            text = text[end:].lstrip(" \t\r\n\x1e")
    except ValueError:
        return None
    return repr(found) if found else None


def streaming(chunks: Iterable[bytes]) -> str | None:
    """What we make of the body."""
    try:
        found, wrong = documents(chunks)
    except DecodingError:
        return None
    return repr(in_memory(found)) if wrong is None else None


def cut(body: bytes, places: Sequence[int]) -> list[bytes]:
    return [body[start:end] for start, end in pairwise([0, *sorted(places), len(body)])]


KEYS = st.sampled_from(["data", "b64_json", "usage", "url", "créé", "b64", "", 'a"b\\', "𝄞"]) | st.text(
    max_size=4
)
TEXT = st.text(max_size=12) | st.sampled_from(
    ['"b64_json": "QUJD"', "\\", '"', "NaN", "{[", "QUJD", "\ud800"]
)
BASE64 = st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode()) | st.sampled_from(
    [
        "QUI",
        "QU I=\n",
        "QQ==QUI=",
        "_-8",
        "data:;base64,QUI",
        "%51QQ",
        "http://x",
        "a*b",
        " ",
        "QUJ\\nDR",
        "A",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(st.tuples(KEYS.filter("b64_json".__ne__), inner), max_size=4).map(Pairs)
    ),
    max_leaves=12,
)
FIELDS = st.tuples(KEYS.filter(lambda key: key not in ("data", "b64_json")), VALUES)
IMAGE = st.tuples(st.just("b64_json"), BASE64 | st.none() | st.integers() | st.lists(BASE64, max_size=2))
ITEM = st.lists(FIELDS | IMAGE, max_size=4).map(Pairs)
DATA = st.tuples(st.just("data"), st.lists(ITEM | VALUES, max_size=3))
ANSWER = st.lists(FIELDS | DATA | IMAGE, max_size=5).map(Pairs)
WRAPPED = st.lists(FIELDS | st.tuples(st.just("data"), ANSWER), max_size=3).map(Pairs)
# an image's key where no image belongs
ELSEWHERE = st.lists(st.tuples(KEYS, ANSWER | ITEM) | FIELDS, max_size=3).map(Pairs) | st.lists(ITEM | VALUES)
DOCUMENTS = ANSWER | WRAPPED | ELSEWHERE | VALUES


def write_string(text: str, draw: st.DrawFn) -> str:
    escaped = draw(st.sampled_from(["as needed", "all", "slashes"]))
    if escaped == "all":
        units = text.encode("utf-16-be", "surrogatepass").hex()
        return '"' + "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)) + '"'
    written = json.dumps(text, ensure_ascii=any("\ud800" <= character <= "\udfff" for character in text))
    return written.replace("/", "\\/") if escaped == "slashes" else written


def write(value: Any, draw: st.DrawFn) -> str:
    """JSON with white space and escapes where they may be."""
    space = draw(st.sampled_from(["", "", " ", "\n", "\t \r\n"]))
    match value:
        case Pairs():
            pairs = [f"{write(key, draw)}:{write(item, draw)}" for key, item in value]
            return f"{space}{{{space}{','.join(pairs)}}}{space}"
        case list():
            return f"{space}[{space}{','.join(write(item, draw) for item in value)}]{space}"
        case str():
            return space + write_string(value, draw) + space
        case _:
            return space + json.dumps(value) + space


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    mark = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"]))
    return mark + write(draw(DOCUMENTS), draw).encode()


@st.composite
def chunked(draw: st.DrawFn, of: st.SearchStrategy[bytes]) -> list[bytes]:
    body = draw(of)
    return cut(body, draw(st.lists(st.integers(0, len(body)), max_size=6)))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    body = draw(bodies())
    for _ in range(draw(st.integers(1, 3))):
        start, length = draw(st.integers(0, len(body))), draw(st.integers(0, 3))
        body = body[:start] + draw(st.binary(max_size=3) | TOKENS) + body[start + length :]
    return body


TOKENS = st.sampled_from(
    rb"""{ } [ ] , : " \ / N NaN Infinity -Infinity - 1 1e999 null true "b64_json" "data" "b64\u005fjson"
    {"data":[{"b64_json": {"b64_json": "QUJD" "QQ==" "QQ= "\u0051Q==" "\/\/8=" \u005 = "=" "A" """.split()
) | st.sampled_from([b" ", b"\xff", b"\xef\xbb\xbf", b"\x00"])
SOUP = st.lists(TOKENS, max_size=14).map(b"".join)


@given(chunked(bodies()))
def test_same_as_json_loads_on_anything_valid(chunks: list[bytes]) -> None:
    """Valid JSON with valid base64 gives what json.loads and b64decode give, however it is cut."""
    expected = plainly(b"".join(chunks))
    assert expected is not None
    assert streaming(chunks) == expected


#: A backslash that begins no escape.
NO_ESCAPE = re.compile(rb'(?<!\\)((?:\\\\)*)\\(?!["\\/bfnrt]|u[0-9A-Fa-f]{4})')


@example([b'{"usage":1,"b64_json":"\\\x00u0041\\u0041"}'])
@example([b'{} "closed, then a string"'])
@example([b'{"a": 1,} "a comma, closed, then a string"'])
@example([b'{"b64_json" "QUJD"}'])
@example([b'{"b64_json": "QUJD" "QUJD"}'])
@example([b'{"b64_json": -"QUJD"}'])
@example([b'{"b64_json": "QUJD"NaN}'])
@example([b'[}"b64_json": "QUJD"'])
@example([b'{"b64_json": "QUJD", "b64_json": "-"}'])
@given(chunked(damaged() | SOUP | st.binary(max_size=30)))
def test_same_as_json_loads_on_anything_else(chunks: list[bytes]) -> None:
    """Damaged bodies, tokens in any order and random bytes are refused where the plain way refuses them.

    But for an escape that is none, in an image: it costs that image, not the answer.
    """
    body = b"".join(chunks)
    found, expected = streaming(chunks), plainly(body)
    assert found == expected or (expected is None and found == plainly(NO_ESCAPE.sub(rb"\1?", body)))


SMALL = [
    b'{"created":1,"data":[{"b64_json":"QUJDRA==","revised":"x"},{"b64_json":"\\u0051UI="}],"usage":{"a":[{}]}}',
    b' { "data" : [ { "r" : "say \\"b64_json\\": \\\\" , "b64_json" : "\\/\\/\\/\\/" } , { "u" : 1 } ] }\n',
    b'{"status":"SUCCESS","message":"\xc3\xa9\\ud834\\udd1e","data":{"data":[{"b64_json":"QQ=="}],"created":-1.5e3}}',
    b'\xef\xbb\xbf{"b64_json":"QUJD","type":"image_generation.completed","b64\\u005fjson":"QUI="}',
    b'{"data":[{"b64_json":null},{"b64_json":""},{"b64_json":["QUJD"]},[{"b64_json":"QUJD"}]],"data ":{}}',
    b'[{"b64_json":"not, base64"},"b64_json",{"data":{"b64_json":"-"}}]',
    b'{"b64":"QU%4a\\nD","image_base64":"data:image\\/png;base64,QQ","x":"iVBORw0KGgo_","url":" http:\\/\\/x "}',
]


@pytest.mark.parametrize("body", SMALL)
def test_every_chunk_boundary(body: bytes) -> None:
    """Two cuts at every pair of places, and a cut at every place at once, change nothing."""
    expected = plainly(body)
    assert expected is not None
    assert streaming([body[i : i + 1] for i in range(len(body))]) == expected
    for first in range(len(body)):
        for second in range(first, len(body)):
            assert streaming(cut(body, (first, second))) == expected


@pytest.mark.parametrize("body", [body.strip() for body in SMALL])
def test_every_truncation_is_refused(body: bytes) -> None:
    """A body cut anywhere is refused, and told from one that is wrong once its JSON has begun."""
    for end in range(len(body)):
        begun = end == 0 or b"{" in body[:end] or b"[" in body[:end]
        with pytest.raises(EarlyEnd if begun else DecodingError):
            decode([body[:end]])


@pytest.mark.parametrize("size", [1, 2, 3, SLICE // 4 * 3 - 1, SLICE // 4 * 3, SLICE // 4 * 3 + 1, SLICE * 2])
@pytest.mark.parametrize("chunk", [1000, 65536, 1_000_000])
def test_large_images(size: int, chunk: int) -> None:
    """Images around the size of a slice, and over it, arrive whole and hashed, next to each other."""
    images = [os.urandom(size), os.urandom(size + 1)]
    body = json.dumps({"data": [{"b64_json": base64.b64encode(image).decode()} for image in images]}).encode()
    body = body.replace(b"/", b"\\/", 50)
    document = decode(body[i : i + chunk] for i in range(0, len(body), chunk))
    assert [item["b64_json"].read_bytes() for item in document["data"]] == images


LONG = base64.b64encode(bytes(3 * SLICE))
WHOLE = bytes(3 * SLICE)
DRESSED = {
    "padding is missing": (b"%sQUI", WHOLE + b"AB"),
    "one character over": (b"%sA", WHOLE),
    "more after the padding": (b"%sQQ==AAAA", WHOLE + b"A\0\0\0"),
    "padding before": (b"QQ==%s", b"A" + WHOLE),
    "a line break": (b"AAAA\nAAAA%s", bytes(6) + WHOLE),
    "an escaped line break": (b"AAAA\\nAAAA%s", bytes(6) + WHOLE),
    "blanks": (b"AAAA    %s", bytes(3) + WHOLE),
    "the URL-safe alphabet": (b"AA-_%s", b"\0\x0f\xbf" + WHOLE),
    "the URL-safe alphabet late": (b"%sAA-_", WHOLE + b"\0\x0f\xbf"),
    "a data: URI": (b"data:image/png;base64,%s", WHOLE),
    "a data: URI in percent": (b"data:image/png;base64,%s%%51Q%%3D%%3D", WHOLE + b"A"),
}


@pytest.mark.parametrize("chunk", [1000, 65_537, 10**7])
@pytest.mark.parametrize("name", DRESSED)
def test_base64_in_any_dress(name: str, chunk: int) -> None:
    """Long images are undressed in slices, wherever the dress is."""
    text, expected = DRESSED[name]
    body = b'{"data":[{"b64_json":"' + text % LONG + b'"}]}'
    document = decode(body[i : i + chunk] for i in range(0, len(body), chunk))
    assert document["data"][0]["b64_json"].read_bytes() == expected


BAD = {
    "a letter beyond ASCII": "AAéA%s".encode(),
    "a letter beyond ASCII, escaped": b"AA\\u00e9A%s",
    "half a surrogate pair, escaped": b"AAAA\\ud800%s",
    "an escape that is none": b"\\u004gAAA%s",
    "an escaped quote": b'%s\\"',
    "a word": b"%s, or not",
    "a percent sign": b"%%g%s",
}


@pytest.mark.parametrize("image", [b"QUJD", LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_base64_costs_no_other_image(name: str, image: bytes) -> None:
    """It is told in its place, in short and in long images; what stands beside it is read."""
    body = b'{"data":[{"b64_json":"' + BAD[name] % image + b'"},{"b64_json":"QUJD"}]}'
    bad, good = decode([body])["data"]
    assert isinstance(bad["b64_json"], DecodingError)
    assert good["b64_json"].read_bytes() == b"ABC"


def test_padding_wherever_slices_end() -> None:
    """What follows padding is read on, also where padding is the last that a slice of a long image has."""
    for length in range(SLICE, SLICE + 12):
        for end in range(length - 8, length + 1):
            text = b"A" * (end - 1) + b"=" + b"A" * 8
            decoder = StreamingJSON()
            decoder.feed(b'{"b64_json":"')
            decoder.feed(text[:length])
            decoder.feed(text[length:] + b'"}')
            ((document,), wrong) = decoder.finish()
            assert (document["b64_json"].read_bytes(), wrong) == (undressed(text.decode()), None)


def test_one_document_may_follow_another() -> None:
    """JSON Lines and JSON sequences are so many documents; what is none ends them."""
    found, wrong = documents([b'{"b64_json": "QUJD"}\n\x1e[1]\n2 "x"  oops {}'])
    assert in_memory(found) == [{"b64_json": b"ABC"}, [1], 2, "x"]
    assert "not JSON" in str(wrong)


@pytest.mark.parametrize("body", [body.strip() for body in SMALL])
def test_the_whole_values_of_a_body_that_is_cut(body: bytes) -> None:
    """Of a body cut anywhere there are the values that came whole: never others than in the whole."""

    def is_part(part: Any, whole: Any) -> bool:
        match part:
            case dict():
                return all(key in whole and is_part(value, whole[key]) for key, value in part.items())
            case list():
                return len(part) <= len(whole) and all(map(is_part, part, whole))
            case bytes() | None:
                return True  # judged by who knows images
            case _:
                return part == whole

    whole = in_memory(decode([body]))
    for end in range(len(body)):
        found, wrong = documents([body[:end]])
        assert isinstance(wrong, DecodingError)
        assert is_part(in_memory(found), [whole])


def test_bodies_are_bounded() -> None:
    """A body over the limit is refused as soon as it is over it."""
    decoder = StreamingJSON(max_bytes=20)
    decoder.feed(b'{"data": "0123456789')
    with pytest.raises(DecodingError, match="longer than 20 bytes"):
        decoder.feed(b'"')
    assert decode([b'{"a":1}'], max_bytes=7) == {"a": 1}


BOUNDED = {
    "text": (b'{"a": "' + b"x" * json_stream.MAX_KEPT, "beside its images"),
    "space": (b" " * (json_stream.MAX_KEPT + 1), "beside its images"),
    "key": (b'{"' + b"x" * json_stream.MAX_KEPT, "beside its images"),
    "depth": (b"[" * 100_000, "levels deep"),
    "mixed depth": (b'{"a":[' * 100_000, "levels deep"),
    "parts": (b"[" + b"[]," * 100_000, "parts"),
    "images": (b'{"data":[' + b'{"b64_json":"QUJD"},' * (json_stream.MAX_IMAGES + 1), "images"),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_kept_is_bounded(name: str) -> None:
    """Text, nesting, parts and images are bounded: such a body is refused while it arrives."""
    body, message = BOUNDED[name]
    with pytest.raises(DecodingError, match=message):
        StreamingJSON().feed(body)


def test_nesting_within_the_bound() -> None:
    """Nesting up to the bound is read."""
    body = b"[" * json_stream.MAX_DEPTH + b"]" * json_stream.MAX_DEPTH
    assert decode([body]) == json.loads(body)


def test_memory_does_not_grow_with_images() -> None:
    """Decoding 12 MB of images takes some 2 MB of memory in any dress, also when all of it comes at once."""
    plain = base64.b64encode(bytes(3_000_000))
    dressed = b"data:image/png;base64,\\n" + b"\\n".join(
        plain[at : at + 76] for at in range(0, len(plain), 76)
    )
    texts = [plain, dressed, plain.rstrip(b"=").replace(b"A", b"_"), plain.replace(b"A", b"%41", 1)]
    body = b'{"data":[' + b",".join(b'{"b64_json":"' + text + b'"}' for text in texts) + b"]}"
    for chunks in (cut(body, range(65536, len(body), 65536)), [body]):
        tracemalloc.start()
        document = decode(chunks)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [item["b64_json"].size_bytes for item in document["data"]] == [3_000_000] * 4
        assert peak < 2_500_000


def test_failures_leave_no_files_open() -> None:
    """The spool files of a bad or abandoned body are closed with its decoder, not at some later time."""
    body = b'{"data":[{"b64_json":"' + LONG
    handles = Path("/proc/self/fd")
    gc.disable()
    try:
        before = len(list(handles.iterdir()))
        for _ in range(20):
            with pytest.raises(EarlyEnd):
                decode([body])
            StreamingJSON().feed(body)
        assert len(list(handles.iterdir())) <= before
    finally:
        gc.enable()
