"""From decoded bodies to facts: both success shapes, all error shapes, and nothing that costs paid images."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from prefect_ttapi.api.json_stream import StreamingJSON
from prefect_ttapi.api.outcomes import ErrorBody
from prefect_ttapi.api.payload import (
    LONGEST_MESSAGE,
    Item,
    UnusableAnswer,
    find_error,
    read_answer,
    read_error,
    read_usage,
)
from prefect_ttapi.images.spool import Spool
from tests.support.hostile import b64, png

PNG = b64(png())
EXAMPLE = {  # the vendor's own
    "created": 1745818538,
    "data": [{"url": "https://filesystem.site/cdn/cat.webp", "revised_prompt": "A cute fluffy cat"}],
    "usage": {
        "input_tokens": 9,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 9},
        "output_tokens": 4160,
        "total_tokens": 4169,
    },
}


def decoded(document: Any) -> object:
    """The document as it comes out of the decoder, with spools where images were."""
    decoder = StreamingJSON()
    decoder.feed(json.dumps(document).encode())
    (found,), wrong = decoder.finish()
    assert wrong is None
    return found


def test_the_vendors_example() -> None:
    """The vendor's own example gives its image's URL, tokens and time."""
    answer = read_answer(decoded(EXAMPLE))
    assert answer.items == (
        Item(None, SecretStr("https://filesystem.site/cdn/cat.webp"), "A cute fluffy cat"),
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4169
    assert answer.usage.input_tokens_details == {"image_tokens": 0, "text_tokens": 9}
    assert answer.created == 1745818538


def test_the_older_wrapper_is_the_same_answer() -> None:
    """An answer inside the vendor's older wrapper gives the same facts."""
    wrapped = {"status": "SUCCESS", "message": "success", "data": EXAMPLE}
    assert read_answer(decoded(wrapped)) == read_answer(decoded(EXAMPLE))
    outside = {**wrapped, "data": {"data": EXAMPLE["data"]}, "usage": EXAMPLE["usage"], "created": 1745818538}
    assert read_answer(decoded(outside)) == read_answer(decoded(EXAMPLE))


@pytest.mark.parametrize("wrapper", [False, True])
def test_the_item_decides(wrapper: bool) -> None:
    """Each item is taken for what it holds: bytes, a URL, or both; empty and null count as not there."""
    document: Any = {
        "data": [
            {"b64_json": PNG},
            {"url": "https://host/a.png", "b64_json": None},
            {"url": "https://host/b.png", "b64_json": ""},
            {"url": "", "b64_json": PNG, "revised_prompt": None, "size": "1x1", "b64_json_2": "?"},
            {"url": "https://host/c.png", "b64_json": PNG},
        ]
    }
    answer = read_answer(decoded({"status": "SUCCESS", "data": document} if wrapper else document))
    assert [
        (item.image and item.image[0].read_bytes(), item.url.get_secret_value() or None)
        for item in answer.items
    ] == [
        (png(), None),
        (None, "https://host/a.png"),
        (None, "https://host/b.png"),
        (png(), None),
        (png(), "https://host/c.png"),
    ]
    assert (answer.usage, answer.created) == (None, None)


UNUSABLE = {
    "the vendor's failure": (
        {"status": "FAILED", "message": "generation timed out", "data": None},
        "^generation timed out$",
    ),
    "a failure in lower case": ({"status": "failed", "message": "no"}, "^no$"),
    "a failure beside images": ({"status": "FAILED", "message": "no", "data": [{"url": "u"}]}, "^no$"),
    "a failure and its manual": ({"status": "FAILED", "message": "no", "url": "https://host/errors"}, "^no$"),
    "OpenAI's error": (
        {"error": {"message": "bad size", "type": "t", "code": "c", "param": "p"}},
        "^bad size$",
    ),
    "an error in words": ({"error": "bad size"}, "^bad size$"),
    "an error in the wrapper": (
        {"status": "SUCCESS", "data": {"error": {"message": "bad size"}}},
        "^bad size$",
    ),
    "a failure without a word": ({"status": "FAILED", "data": None}, "FAILED"),
    "no images": ({"created": 1, "data": []}, "no images"),
    "no images in the wrapper": (
        {"status": "SUCCESS", "message": "queued", "data": {"data": []}},
        "no images: queued",
    ),
    "no data": ({}, "no images"),
    "data that is null": ({"status": "ON_QUEUE", "message": "wait", "data": None}, "no images: wait"),
    "items without image": ({"data": [{"revised_prompt": "x"}, "y"]}, "item 0 .* neither"),
    "an empty item": ({"data": [{"url": "", "b64_json": ""}]}, "item 0 .* neither"),
    "an item with a number": ({"data": [{"url": 1, "b64_json": 2}]}, "item 0 .* neither"),
    "data that is text": ({"data": "queued"}, "no images"),
    "an item that is text": ({"data": ["queued"]}, "item 0 .* no JSON object"),
    "a list": (["queued"], "no JSON object"),
    "text": ("ok", "no JSON object"),
    "nothing": (None, "no JSON object"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_answers(name: str) -> None:
    """A 200 without usable images is refused in the API's own words, where it has any."""
    document, message = UNUSABLE[name]
    with pytest.raises(UnusableAnswer, match=message):
        read_answer(decoded(document))


def test_an_item_that_is_no_image_costs_no_other() -> None:
    """Images are paid together: what is wrong with one of them is said beside the others."""
    answer = read_answer(decoded({"data": [{"b64_json": None}, {"url": "u"}, "text"]}))
    assert answer.items == (Item(None, SecretStr("u")),)
    assert [problem.partition(" of ")[0] for problem in answer.problems] == ["item 0", "item 2"]


def test_an_unusable_answer_says_what_the_api_says() -> None:
    """The API's own words where it reports an error, else what came instead of images."""
    with pytest.raises(UnusableAnswer) as caught:
        read_answer(
            {"error": {"message": "blocked", "type": "user", "code": "moderation_blocked", "param": None}}
        )
    assert str(caught.value) == "blocked"
    with pytest.raises(UnusableAnswer) as caught:
        read_answer({"data": []})
    assert str(caught.value) == 'the answer has no images: {"data": []}'


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
USAGE = st.dictionaries(st.sampled_from(sorted(EXAMPLE["usage"])) | st.text(max_size=4), ODD, max_size=5)


@given(usage=USAGE | ODD, created=ODD, prompt=ODD, more=st.dictionaries(st.text(max_size=5), ODD, max_size=3))
def test_odd_facts_never_cost_the_images(usage: Any, created: Any, prompt: Any, more: dict[str, Any]) -> None:
    """Whatever stands beside the images, they are read, and what is kept of the rest can be written down."""
    fields = {key: value for key, value in more.items() if key not in ("data", "error", "status")}
    item = {"url": "https://host/a.png", "revised_prompt": prompt}
    answer = read_answer({**fields, "data": [item], "usage": usage, "created": created})
    assert answer.items[0].url.get_secret_value() == "https://host/a.png"
    json.dumps([answer.items[0].revised_prompt, answer.created], ensure_ascii=False).encode()
    assert answer.usage is None or answer.usage.model_dump_json()
    assert answer.created is None or type(answer.created) is int


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        (1745818538, 1745818538),
        (0, 0),
        (True, None),
        (1.5, None),
        ("1745818538", None),
        (None, None),
        ([], None),
    ],
)
def test_created_is_a_whole_number_or_nothing(created: object, expected: int | None) -> None:
    """A time stamp of another kind is taken for none."""
    assert read_answer({"data": [{"url": "u"}], "created": created}).created == expected


def test_a_revised_prompt_can_be_written_down() -> None:
    """Half a surrogate pair and NUL, which files and databases refuse, are replaced; the rest is kept."""
    body = b'{"data": [{"url": "u", "revised_prompt": "a \\ud83d cat\\u0000 \\ud83d\\ude00\\n"}]}'
    decoder = StreamingJSON()
    decoder.feed(body)
    assert read_answer(decoder.finish()[0][0]).items[0].revised_prompt == "a ? cat? 😀\n"


def test_usage_keeps_what_it_does_not_know() -> None:
    """Unknown counts are kept; what is no object is no usage."""
    usage = read_usage({"input_tokens": 1, "thinking_tokens": 7})
    assert usage is not None
    assert usage.model_extra == {"thinking_tokens": 7}
    assert [read_usage(other) for other in (None, [], "9 tokens", 9)] == [None] * 4
    assert read_usage({"input_tokens": 1, "note": "half a pair: \ud83d"}) is None


def test_an_event_without_error_reports_none() -> None:
    """An event of a stream that goes well reports no error, nor does one whose error is null."""
    spool = Spool()
    for event in ({"type": "image_generation.completed", "b64_json": spool}, {"error": None}, [], None, "x"):
        assert find_error(event) is None
    event = {"type": "error", "error": {"type": "server_error", "message": "overloaded"}}
    assert find_error(event) == ErrorBody("overloaded", "server_error")


CLOUDFLARE = """<!DOCTYPE html>
<!--[if lt IE 7]> <html class="no-js ie6 oldie"> <![endif]-->
<html><head><title>api.ttapi.io | 524: A timeout occurred</title>
<style>body > .a { color: red }</style><script defer>if (1 < 2) { alert("<b>no</b>") }</script></head>
<body><h1 class="a">A timeout occurred</h1>\r\n<p>Ray ID: 8f2 &bull; 2026-01-01 &amp; so on</p>
<script>unfinished"""

ERRORS: dict[str, tuple[bytes, str | None, ErrorBody]] = {
    "OpenAI's": (
        b'{"error": {"message": "Invalid size.", "type": "invalid", "code": null, "param": "size"}}',
        "application/json",
        ErrorBody("Invalid size.", "invalid"),
    ),
    "the vendor's": (
        b'{"status": "FAILED", "message": "TT-API-KEY is invalid", "data": null}',
        "application/json",
        ErrorBody("TT-API-KEY is invalid"),
    ),
    "a proxy's": (
        CLOUDFLARE.encode(),
        "text/html; charset=UTF-8",
        ErrorBody(
            "api.ttapi.io | 524: A timeout occurred A timeout occurred Ray ID: 8f2 • 2026-01-01 & so on",
            page=True,
        ),
    ),
    "HTML that claims to be JSON": (b"  <h1>502</h1>", "application/json", ErrorBody("502", page=True)),
    "HTML by its type": (b"502 <b>Bad</b> Gateway", "Text/HTML", ErrorBody("502 Bad Gateway", page=True)),
    "longer than is read": (
        b'{"message": "no", "trace": "' + b"x" * 70_000 + b'"}',
        None,
        ErrorBody('{"message": "no", "trace": ...'),
    ),
    "Cloudflare's to programs": (b"error code: 1020", "text/plain", ErrorBody("error code: 1020", page=True)),
    "Azure's": (
        b'{"error": {"message": "no", "code": "content_filter", "innererror": {"code": "X"}}}',
        "application/json",
        ErrorBody("no", None, "content_filter", "X"),
    ),
    "one of several": (b'{"detail": [{"msg": "no", "type": "y"}, {"msg": "z"}]}', None, ErrorBody("no", "y")),
    "plain text": (b"upstream < timeout > reached", "text/plain", ErrorBody("upstream < timeout > reached")),
    "without a type": (b"no healthy upstream", None, ErrorBody("no healthy upstream")),
    "empty": (b"", None, ErrorBody("no message")),
    "only tags": (b"<html><body></body></html>", "text/html", ErrorBody("no message", page=True)),
    "an error in words": (b'{"error": "bad", "code": 7}', None, ErrorBody("bad", None, "7")),
    "a web framework's": (b'{"detail": "Not Found"}', None, ErrorBody("Not Found")),
    "Spring's": (b'{"error": "Bad Request", "message": "no prompt"}', None, ErrorBody("no prompt")),
    "a relay's": (b'{"code": 401, "msg": "no key"}', None, ErrorBody("no key", None, "401")),
    "an error without words": (b'{"error": {"code": "x"}}', None, ErrorBody('{"code": "x"}', None, "x")),
    "a blank message": (b'{"message": " ", "msg": "why"}', None, ErrorBody("why")),
    "a message that is no text": (b'{"message": {"a": 1}}', None, ErrorBody('{"message": {"a": 1}}')),
    "JSON that is no object": (b'["no"]', None, ErrorBody('["no"]')),
    "with a byte-order mark": (b'\xef\xbb\xbf{"message": "no"}', None, ErrorBody("no")),
    "control characters": (
        b'{"message": "a\\r\\n\\u001b[31mb\\u202ec\\ud800d\\u2028e", "x": 1}',
        None,
        ErrorBody("a [31mb c d e"),
    ),
    "no UTF-8": (b"caf\xe9 closed", None, ErrorBody("caf\ufffd closed")),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_bodies(name: str) -> None:
    """Every shape of error becomes one line of plain text, with OpenAI's labels where there are any."""
    body, content_type, expected = ERRORS[name]
    assert read_error(body, content_type) == expected


def test_long_messages_are_cut_between_words() -> None:
    """A message has a longest length; no word is cut, since half a key would not be recognised as the key."""
    message = read_error(b"word " * 10_000, None).message
    assert message.endswith("word ...")
    assert LONGEST_MESSAGE - 10 < len(message) <= LONGEST_MESSAGE + 4
    assert read_error(b"x" * 100_000, None).message == "..."


HOSTILE = [
    b"<",
    b"<script",
    b"<script>",
    b"<!--",
    b"<a ",
    b"</",
    b"&#1",
    b"[",
    b'{"error":',
    b'{"a":',
    b"\x00",
    b"<style>",
]


@given(
    st.binary(max_size=200)
    | st.builds(
        lambda part, times, end: part * times + end, st.sampled_from(HOSTILE), st.just(30_000), st.binary()
    ),
    st.sampled_from([None, "text/html", "application/json", "☃; charset=no"]),
)
def test_reading_an_error_never_fails(body: bytes, content_type: str | None) -> None:
    """Whatever a server sends as an error, the result is one bounded line of printable text."""
    error = read_error(body, content_type)
    assert error.message.isprintable()
    assert 1 <= len(error.message) <= LONGEST_MESSAGE + 4
