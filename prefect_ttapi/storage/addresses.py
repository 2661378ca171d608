"""What may be written as a store's address, and what it means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def is_s3(url: str) -> bool:
    """Whether a normalised address is a bucket's."""
    return url.startswith("s3://")


def normalised(url: str) -> str:
    """An absolute folder, or `s3://bucket/prefix` without a slash at its end.

    >>> normalised("s3://pictures/2031/"), normalised("file:///srv/a%20b"), normalised("/srv/pictures/")
    ('s3://pictures/2031', '/srv/a b', '/srv/pictures')

    Raises:
        ValueError: it is neither a folder, nor a file:// URL, nor s3://bucket/prefix.
    """
    if not url.strip() or not url.isprintable():
        raise ValueError("is empty or holds control characters; give a folder or s3://bucket/prefix")
    scheme = _SCHEME.match(url)
    reader = _READERS.get(scheme[1].lower() if scheme else "")
    if reader is None:
        raise ValueError(f"{url!r} is not understood; give a folder, file:///folder or s3://bucket/prefix")
    return reader(url)


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """The parts of a normalised S3 address; the prefix has no slash at either end.

    >>> bucket_and_prefix("s3://pictures/2031/may")
    ('pictures', '2031/may')
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, prefix


def folder_of(url: str) -> Path:
    """The folder of a normalised local address."""
    return Path(url)


def checked_web_address(url: str) -> str:
    """`url` without a slash at its end.

    Raises:
        ValueError: it is no http(s) URL, or has user, password, query or fragment.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
        raise ValueError("is no address like https://example.com")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("takes no user, password, query or fragment")
    return url.strip().rstrip("/")


def _from_path(url: str) -> str:
    return str(Path(url).expanduser().absolute())


def _from_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise ValueError(f"{url!r} must look like file:///folder, without host, query or fragment")
    return _from_path(unquote(parts.path) or "/")


def _from_s3_url(url: str) -> str:
    bucket, _, prefix = url[len("s3://") :].partition("/")
    if not bucket:
        raise ValueError(f"{url!r} names no bucket; it must look like s3://bucket/prefix")
    if "@" in bucket or ":" in bucket:
        raise ValueError(
            "an s3:// address takes no user, password or port; use access_key_id and endpoint_url"
        )
    if any(mark in url for mark in "?#"):
        raise ValueError("an s3:// address takes no query or fragment")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"{bucket!r} is no legal bucket name")
    prefix = prefix.rstrip("/")
    if prefix and any(segment in ("", ".", "..") for segment in prefix.split("/")):
        raise ValueError(f"the prefix {prefix!r} has an empty, '.' or '..' segment")
    return f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"


_READERS: Final = {"": _from_path, "file": _from_file_url, "s3": _from_s3_url}
