"""Which addresses may be called with the key, and under which name their answers are filed."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.origins import (
    DEFAULT_BASE_URL,
    SANDBOX_ORIGIN,
    SANDBOX_PATH,
    checked_base_url,
    is_loopback,
    origin_of,
)

GOOD = [
    ("https://api.ttapi.io", "https://api.ttapi.io"),
    ("https://api.ttapi.org", "https://api.ttapi.io"),
    ("  https://api.ttapi.io/\n", "https://api.ttapi.io"),
    ("https://api.ttapi.io//", "https://api.ttapi.io"),
    ("HTTPS://API.TTAPI.ORG:443", "https://api.ttapi.io"),
    ("https://api.ttapi.io.", "https://api.ttapi.io"),
    ("https://api.ttapi.org.:443/", "https://api.ttapi.io"),
    ("https://api.ttapi.io:8443", "https://api.ttapi.io:8443"),
    ("https://api.ttapi.org:8443", "https://api.ttapi.org:8443"),
    ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
    ("https://proxy.example/ttapi/", "https://proxy.example/ttapi"),
    ("https://proxy.example:80", "https://proxy.example:80"),
    ("https://[2001:db8::1]:8443/x", "https://[2001:db8::1]:8443/x"),
    ("https://10.0.0.7", "https://10.0.0.7"),
    ("http://127.0.0.1", "http://127.0.0.1"),
    ("http://127.8.9.1:80", "http://127.8.9.1"),
    ("http://[::1]:8080", "http://[::1]:8080"),
    ("http://LOCALHOST:443", "http://localhost:443"),
    ("http://localhost:8080/proxy", "http://localhost:8080/proxy"),
]

#: Not called, whatever they mean to whom: each is odd in one way.
BAD = [
    # no URL of ours at all
    "", " ", "api.ttapi.io", "//api.ttapi.io", "https://", "https:///v1", "https:api.ttapi.io",
    "https:/api.ttapi.io",
    "ftp://api.ttapi.io", "file:///etc/passwd", "javascript:alert(1)", "httpsx://api.ttapi.io", "sk-a-key",
    # the key in the clear
    "http://api.ttapi.io", "HTTP://api.ttapi.io", "http://10.0.0.7", "http://0.0.0.0", "http://[::]", "http://example",
    "http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://evil.example/127.0.0.1",
    "http://127.1", "http://2130706433", "http://0x7f.0.0.1", "http://0177.0.0.1", "http://[::ffff:127.0.0.1]",
    "http://[::ffff:7f00:1]",
    "http://localhost.", "http://notlocalhost", "http://localhost:80@evil.example",
    # users and passwords, also empty ones
    "http://127.0.0.1@evil.example", "https://127.0.0.1@evil.example", "https://user:pw@api.ttapi.io",
    "https://user@api.ttapi.io", "https://@api.ttapi.io", "https://:@api.ttapi.io", "https://api.ttapi.io@evil.example",
    "https://api.ttapi.io:443@evil.example", "https://evil.example\\@api.ttapi.io", "https://api.ttapi.io%40evil.example",
    # what would swallow the path that we append
    "https://api.ttapi.io?", "https://api.ttapi.io/?a=b", "https://api.ttapi.io#", "https://api.ttapi.io/#x",
    "https://evil.example#@api.ttapi.io", "https://evil.example?@api.ttapi.io",
    # characters that some programs drop, turn or stop at
    "https://api.tt\napi.io", "https://api.tt\rapi.io", "https://api.tt\tapi.io",
    "https://api.ttapi.io\nX-Evil: 1",
    "https://api.ttapi.io /", "https://api ttapi.io", "https://api.ttapi.io/a b",
    "https://api.ttapi.io\\evil.example",
    "https:\\\\api.ttapi.io", "https://api.ttapi.io\x00.evil.example", "https://\x00", "https://api.ttapi.io\x7f",
    "https://api.ttapi.io\u200b", "https://api.ttapi.io\u2028/x", "https://<host>", "https://*.ttapi.io", "https://a,b",
    "https://${HOST}", "https://{host}", "https://.", "https://..", "https://.ttapi.io", "https://-", "https://_",
    # hosts in other scripts: a look-alike must not get the key, a dot in disguise must not be another origin
    "https://api.ttapi。io", "https://ａpi.ttapi.io", "https://аpi.ttapi.io", "https://bücher.example",
    "http://localhoſt", "http://１２７.0.0.1", "https://api.ttapi.io/ü", "https://api.ttapi.io／v1",
    # ports and addresses that can't be
    "https://api.ttapi.io:", "https://api.ttapi.io:0", "https://api.ttapi.io:65536",
    "https://api.ttapi.io:-1", "https://api.ttapi.io:+443",
    "https://api.ttapi.io:4 43", "https://api.ttapi.io:443:443", "https://api.ttapi.io:٤٤٣", "https://api.ttapi.io:x",
    "https://[::1", "https://::1]", "https://[::1]x", "https://[fe80::1%25eth0]", "https://[v1.x]", "https://2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize(("base_url", "origin"), GOOD)
def test_good_addresses_and_their_origins(base_url: str, origin: str) -> None:
    """A plain address is accepted, gets no trailing slash, and has one name however it is written."""
    assert origin_of(base_url) == origin
    checked = checked_base_url(base_url)
    assert checked == base_url.strip().rstrip("/")
    assert checked_base_url(checked) == checked
    assert origin_of(checked) == origin


@pytest.mark.parametrize("base_url", BAD)
def test_bad_addresses_are_refused(base_url: str) -> None:
    """What could send the key astray is refused in one line that never repeats what was given."""
    for judge in (checked_base_url, origin_of):
        with pytest.raises(ValueError, match=r"^base_url must ") as caught:
            judge(base_url)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "secret", ["sk-Marked9", "https://me:sk-Marked9@api.ttapi.io:99999", "sk-Marked9://x"]
)
def test_a_key_in_the_wrong_place_is_not_shown(secret: str) -> None:
    """Key and address swapped, or a password in the address: the error does not print it."""
    with pytest.raises(ValueError, match="base_url must look like") as caught:
        checked_base_url(secret)
    assert "Marked9" not in str(caught.value)


def test_http_names_the_host_that_would_see_the_key() -> None:
    """http to another machine is refused with the reason."""
    with pytest.raises(ValueError, match=r"must be https: the API key would cross .* to api\.ttapi\.io"):
        checked_base_url("http://api.ttapi.io")


def test_the_vendors_hosts_are_one() -> None:
    """api.ttapi.io and api.ttapi.org are one vendor with one bill, so their answers have one origin."""
    assert (
        origin_of("https://api.ttapi.org") == origin_of("https://api.ttapi.io") == origin_of(DEFAULT_BASE_URL)
    )
    assert origin_of("https://api.ttapi.org.evil.example") != origin_of(DEFAULT_BASE_URL)
    assert origin_of("https://evil-api.ttapi.io") != origin_of(DEFAULT_BASE_URL)
    assert origin_of("https://ttapi.io") != origin_of(DEFAULT_BASE_URL)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "127.0.0.1:65535", "localhost", "LocalHost:80", "[::1]:9", "127.1.2.3"]
)
def test_the_sandbox_is_one_origin(host: str) -> None:
    """The sandbox changes its port with each start, yet its answers are found again."""
    assert origin_of(f"http://{host}/sandbox") == SANDBOX_ORIGIN
    assert origin_of(f"http://{host}/sandbox/") == SANDBOX_ORIGIN


hosts = st.one_of(
    st.sampled_from(
        ["api.ttapi.io", "api.ttapi.org", "sandbox", "localhost.example", "10.0.0.1", "[2001:db8::1]"]
    ),
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}\.){1,3}[a-z]{2,5}", fullmatch=True),
)


@given(
    hosts, st.sampled_from(["", ":443", ":8080"]), st.sampled_from(["", "/", "/sandbox", "/sandbox/", "/x"])
)
def test_nothing_on_another_machine_is_the_sandbox(host: str, port: str, path: str) -> None:
    """Whatever its path, an address that is not this machine never shares the sandbox's origin."""
    origin = origin_of(f"https://{host}{port}{path}")
    assert origin != SANDBOX_ORIGIN
    assert origin.startswith("https://")


@pytest.mark.parametrize("path", ["", "/", "/Sandbox", "/sandbox2", "/sandbox/v1", "/x/sandbox", "/sandbo"])
def test_another_path_on_this_machine_is_not_the_sandbox(path: str) -> None:
    """Only the sandbox's own path makes an address of this machine the sandbox: a local proxy may be real."""
    assert origin_of(f"http://127.0.0.1:8000{path}") == f"http://127.0.0.1:8000{path}".rstrip("/")


@given(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.sampled_from(["", "https://", "http://", "https://api."]),
)
def test_any_text_is_judged_not_crashed_on(text: str, start: str) -> None:
    """No text raises anything but ValueError, and what passes is plain."""
    try:
        checked = checked_base_url(start + text)
    except ValueError:
        return
    assert checked.isascii()
    assert not set(checked) & set(" \\?#\n\r\t")


@given(
    st.from_regex(r"(https|HTTP|Https)://[a-zA-Z0-9.@:\[\]\\%/?#-]{1,30}", fullmatch=True),
)
def test_the_http_client_reads_an_address_as_we_do(address: str) -> None:
    """For whatever passes, httpx goes to the host, port and scheme under which the answer is filed."""
    try:
        origin = origin_of(address)
    except ValueError:
        return
    try:
        url = httpx.URL(checked_base_url(address) + "/v1/images/generations")
    except httpx.InvalidURL:
        return  # refused once more: nothing is sent
    assert url.userinfo == b""
    assert not url.query
    assert not url.fragment
    assert url.scheme == "https" or is_loopback(url.host)
    if origin not in (SANDBOX_ORIGIN, DEFAULT_BASE_URL):
        assert httpx.URL(origin).host.rstrip(".") == url.host.rstrip(".")
        assert httpx.URL(origin).port == url.port


def test_loopback_is_this_machine_only() -> None:
    """Names and addresses that merely look like this machine are not."""
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.255.255.254", "::1"]))
    others = ["", "0.0.0.0", "::", "localhost.", "localhost.example", "127.1", "10.0.0.1", "128.0.0.1", "::2"]  # noqa: S104
    assert not any(map(is_loopback, others))
    # Python's own is_loopback says yes to these from 3.13 on, and no before
    assert not any(map(is_loopback, ["::ffff:127.0.0.1", "::ffff:7f00:1"]))
    assert origin_of("https://[::ffff:127.0.0.1]/sandbox") == "https://[::ffff:127.0.0.1]/sandbox"
    assert SANDBOX_PATH == "/sandbox"
