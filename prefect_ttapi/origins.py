"""Who answers: the name under which an API's answers are filed, and which addresses may be called at all."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

DEFAULT_BASE_URL: Final = "https://api.ttapi.io"

#: Hosts of one vendor with one bill: an answer from either is an answer from both.
_SAME: Final = {"https://api.ttapi.org": "https://api.ttapi.io"}

#: The path under which the sandbox answers. Its port changes with each start, its answers don't.
SANDBOX_PATH: Final = "/sandbox"
SANDBOX_ORIGIN: Final = "sandbox"


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine, by name or address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("api.ttapi.io")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_base_url(base_url: str) -> str:
    """`base_url` without a trailing slash.

    Raises:
        ValueError: it is no https URL (http only for loopback hosts), or has credentials, query or fragment.
    """
    try:
        parts = urlsplit(base_url.strip())
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"base_url {base_url!r} is no URL: {error}") from None
    if not host or parts.scheme not in ("https", "http"):
        raise ValueError(f"base_url must look like {DEFAULT_BASE_URL}, not {base_url!r}")
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError(
            f"base_url must be https: the API key would cross the network in the clear to {host}"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base_url takes no user, password, query or fragment")
    return base_url.strip().rstrip("/")


def origin_of(base_url: str) -> str:
    """The name under which answers from `base_url` are filed.

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
