"""Who answers: the name under which an API's answers are filed, and which addresses may be called at all."""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

DEFAULT_BASE_URL: Final = "https://api.ttapi.io"

#: Hosts of one vendor with one bill: an answer from either is an answer from both.
_SAME: Final = {"https://api.ttapi.org": "https://api.ttapi.io"}

#: Host, port and path, without anything that two programs could read in two ways.
_PLAIN_URL: Final = re.compile(
    r"https?://([a-z0-9][a-z0-9._-]*|\[[0-9a-f:.]+\])(:[0-9]+)?(/[a-z0-9/._~%!$&'()*+,;=:@-]*)?", re.I | re.A
)

#: The path under which the sandbox answers. Its port changes with each start, its answers don't.
SANDBOX_PATH: Final = "/sandbox"
SANDBOX_ORIGIN: Final = "sandbox"


def is_loopback(host: str) -> bool:
    """Tell whether `host` is this machine, by name or address. The answer is the same on every Python.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "api.ttapi.io", "::ffff:127.0.0.1")]
    [True, True, False, False]
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    # ::ffff:127.0.0.1 is a loopback to Python from 3.13 on
    return address.is_loopback and not getattr(address, "ipv4_mapped", None)


def checked_base_url(base_url: str) -> str:
    """Return `base_url` without a trailing slash.

    Raises:
        ValueError: it is no https URL (http only for loopback hosts), or holds more than host, port and path.
            The message never shows what was given: it could be the key, put in the wrong place.
    """
    url = base_url.strip().rstrip("/")
    if not _PLAIN_URL.fullmatch(url) or not _is_possible(url):
        raise ValueError(
            f"base_url must look like {DEFAULT_BASE_URL}: https, a host in ASCII, perhaps a port and a path, "
            "and no user, password, query or fragment"
        )
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError(
            "base_url must be https: the API key would cross the network in the clear to "
            f"{parts.hostname} (http is for this machine's own addresses only)"
        )
    return url


def _is_possible(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:  # a port or an IPv6 address that can't be
        return False


def origin_of(base_url: str) -> str:
    """Return the name under which answers from `base_url` are filed.

    >>> origin_of("https://API.ttapi.org:443/"), origin_of("http://127.0.0.1:4711/sandbox")
    ('https://api.ttapi.io', 'sandbox')
    >>> origin_of("http://localhost:8080/proxy")
    'http://localhost:8080/proxy'
    """
    parts = urlsplit(checked_base_url(base_url))
    host = (parts.hostname or "").rstrip(".")
    if is_loopback(host) and parts.path == SANDBOX_PATH:
        return SANDBOX_ORIGIN
    port = "" if parts.port in (None, {"https": 443, "http": 80}[parts.scheme]) else f":{parts.port}"
    bracketed = f"[{host}]" if ":" in host else host
    origin = f"{parts.scheme}://{bracketed}{port}"
    return _SAME.get(origin, origin) + parts.path.rstrip("/")
