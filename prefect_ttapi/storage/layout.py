"""The places of everything in a store: each key with its parser, and the meaning of a store's address.

    images/<sha256>.<ext>                       an image, named by its bytes
    ledger/<origin>/<request hash>.json         all that is known of one request
    ledger/probe.json                           what the check of a store writes
    answers/<origin>/<request hash>/<token>     an answer that nobody can read yet, as it came
    batches/<run>[/<task run>][/<number>]/      a batch: manifest.jsonl, manifest.parquet, thumbnails.zip, index.html,
                                                page-2.html and so on, search.html; while it runs, parts/; stop.json
                                                where its task runs in other processes were told to stop
    batches/<run>/unchanged.json                in place of all that, where nothing changed since an earlier batch
    batches/latest/<digest>.json                folders of the last batches of a name
    .metadata/<key>.json                        in local folders: what S3 keeps in an object's headers

This is the only module that knows `s3://` from a folder.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from prefect_ttapi.images.headers import EXTENSIONS
from prefect_ttapi.origins import SANDBOX_ORIGIN

IMAGES: Final = "images/"
LEDGER: Final = "ledger/"
ANSWERS: Final = "answers/"
BATCHES: Final = "batches/"
LATEST: Final = f"{BATCHES}latest/"
PROBE: Final = f"{LEDGER}probe.json"
SIDECARS: Final = ".metadata"

#: Files in a batch's folder.
MANIFEST: Final = "manifest.jsonl"
UNCHANGED: Final = "unchanged.json"
PARQUET: Final = "manifest.parquet"
THUMBNAILS: Final = "thumbnails.zip"
PARTS: Final = "parts/"

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_IMAGE: Final = re.compile(rf"{IMAGES}({_SHA256.pattern})\.([a-z]+)")
_DOCUMENT: Final = re.compile(rf"{LEDGER}([^/]+)/({_SHA256.pattern})\.json")
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")
_ANSWER: Final = re.compile(rf"{ANSWERS}([^/]+)/({_SHA256.pattern})/({_TOKEN.pattern})")
_RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RUN: Final = re.compile(rf"{BATCHES}({_RUN_ID.pattern})(/.*)?")

_S3: Final = "s3://"
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def is_sha256(text: str) -> bool:
    """Return whether it is a SHA-256 in lower-case hexadecimal digits."""
    return _SHA256.fullmatch(text) is not None


def image_key(sha256: str, media_type: str) -> str:
    """Return where an image of these bytes is kept.

    >>> image_key(64 * "0", "image/png") == "images/" + 64 * "0" + ".png"
    True
    """
    return f"{IMAGES}{sha256}.{EXTENSIONS[media_type]}"


def image_in(key: str) -> tuple[str, str] | None:
    """Return SHA-256 and extension of an image's key; None where it is none.

    >>> image_in("images/" + 64 * "0" + ".png")[1], image_in("images/a.png")
    ('png', None)
    """
    found = _IMAGE.fullmatch(key)
    return (found[1], found[2]) if found else None


def ledger_folder(api_origin: str) -> str:
    """Return the prefix of the documents of an API origin.

    >>> ledger_folder("https://api.ttapi.io")
    'ledger/api.ttapi.io/'
    """
    return f"{LEDGER}{slug_of(api_origin)}/"


def ledger_key(slug: str, request_hash: str) -> str:
    """Return where a request's document is, given the slug of the API origin.

    >>> ledger_key("sandbox", 64 * "0") == "ledger/sandbox/" + 64 * "0" + ".json"
    True
    """
    return f"{LEDGER}{slug}/{request_hash}.json"


def document_in(key: str) -> tuple[str, str] | None:
    """Return origin's slug and request hash of a ledger document's key; None where it is none.

    >>> document_in("ledger/sandbox/" + 64 * "0" + ".json")[0], document_in(PROBE)
    ('sandbox', None)
    """
    found = _DOCUMENT.fullmatch(key)
    return (found[1], found[2]) if found else None


def answer_key(slug: str, request_hash: str, token: str) -> str:
    """Return the key of an answer that can't be read yet, given the token of the claim that it was paid under.

    >>> answer_key("sandbox", 64 * "0", 32 * "1") == f"answers/sandbox/{64 * '0'}/{32 * '1'}"
    True
    """
    return f"{ANSWERS}{slug}/{request_hash}/{token}"


def answer_in(key: str) -> tuple[str, str] | None:
    """Return the key of the ledger's document, and the token, of a kept answer's key; None where it is none.

    >>> answer_in(answer_key("sandbox", 64 * "0", 32 * "1")) == (ledger_key("sandbox", 64 * "0"), 32 * "1")
    True
    """
    found = _ANSWER.fullmatch(key)
    return (ledger_key(found[1], found[2]), found[3]) if found else None


def slug_of(api_origin: str) -> str:
    """Return a folder's name for an API origin; no two origins share one.

    >>> slug_of("https://api.ttapi.io"), slug_of("sandbox"), slug_of("http://localhost:8080/proxy")
    ('api.ttapi.io', 'sandbox', 'http_3a_2f_2flocalhost_3a8080_2fproxy')
    """
    host = api_origin.removeprefix("https://")
    # without an escape in it, as every other slug has: so a short name can't be mistaken for a long one
    if host != api_origin and "." in host and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", host):
        return host
    if api_origin == SANDBOX_ORIGIN:
        return api_origin
    if "://" not in api_origin:
        raise ValueError(f"{api_origin!r} is no API origin")
    return re.sub(
        r"[^A-Za-z0-9.-]", lambda sign: "".join(f"_{byte:02x}" for byte in sign[0].encode()), api_origin
    )


def origin_of_slug(slug: str) -> str:
    """Return the API origin that has this slug.

    >>> origin_of_slug("api.ttapi.io"), origin_of_slug("http_3a_2f_2flocalhost_3a8080_2fproxy")
    ('https://api.ttapi.io', 'http://localhost:8080/proxy')

    Raises:
        ValueError: no origin has.
    """
    origins = (SANDBOX_ORIGIN, f"https://{slug}", unquote(slug.replace("_", "%"), errors="replace"))
    for origin in origins:
        if (origin == SANDBOX_ORIGIN or "://" in origin) and slug_of(origin) == slug:
            return origin
    raise ValueError(f"{slug!r} is the folder of no API origin")


def is_run_id(text: str) -> bool:
    """Return whether a flow run may be called so."""
    return _RUN_ID.fullmatch(text) is not None


def run_folder(run_id: str) -> str:
    """Return the prefix of all objects of a flow run's batches."""
    return f"{BATCHES}{run_id}/"


def batch_folder(place: str, number: int = 1) -> str:
    """Return the folder of a run's or task run's batch, by its number from 1.

    >>> batch_folder("run"), batch_folder("run/task", 2)
    ('batches/run', 'batches/run/task/2')
    """
    return f"{BATCHES}{place}" + (f"/{number}" if number > 1 else "")


def run_in(key: str) -> str | None:
    """Return the ID of the run that a batch's folder, or anything below it, belongs to.

    >>> run_in("batches/3f2a/2/index.html"), run_in("images/a.png")
    ('3f2a', None)
    """
    found = _RUN.fullmatch(key)
    return found[1] if found else None


def is_manifest(key: str) -> bool:
    """Return whether an object is a batch's manifest.

    >>> is_manifest("batches/3f2a/manifest.jsonl"), is_manifest("batches/3f2a/parts/000001.jsonl")
    (True, False)
    """
    return key.startswith(BATCHES) and key.endswith(f"/{MANIFEST}")


def unchanged_in(key: str) -> str | None:
    """Return the folder of a batch that changed nothing, given the key of the object it left; None for other keys.

    >>> unchanged_in("batches/3f2a/2/unchanged.json"), unchanged_in("batches/3f2a/manifest.jsonl")
    ('batches/3f2a/2', None)
    """
    folder, _, name = key.rpartition("/")
    return folder if key.startswith(BATCHES) and name == UNCHANGED else None


def page_name(number: int) -> str:
    """Return the file name of a gallery's page, by its number from 1.

    >>> page_name(1), page_name(2)
    ('index.html', 'page-2.html')
    """
    return "index.html" if number == 1 else f"page-{number}.html"


#: What a gallery's pages search each other by.
SEARCH: Final = "search.html"


def part_key(folder: str, number: int) -> str:
    """Return where a part of a batch's rows is kept while the batch runs.

    >>> part_key("batches/3f2a", 1)
    'batches/3f2a/parts/000001.jsonl'
    """
    return f"{folder}/{PARTS}{number:06d}.jsonl"


def stop_key(folder: str) -> str:
    """Return the key of the document that tells task runs in other processes why nothing more is sent.

    >>> stop_key("batches/3f2a")
    'batches/3f2a/stop.json'
    """
    return f"{folder}/stop.json"


def latest_key(name: str, api_origin: str) -> str:
    """Return the key of the document that names the folders of the last batches of a name."""
    digest = hashlib.sha256(f"{api_origin}\n{name}".encode(errors="replace")).hexdigest()
    return f"{LATEST}{digest[:32]}.json"


def sidecar_key(key: str) -> str:
    """Return the key under which a local folder keeps the facts about an object.

    >>> sidecar_key("images/a.png")
    '.metadata/images/a.png.json'
    """
    return f"{SIDECARS}/{key}.json"


def split_at(uri: str, folder: str) -> tuple[str, str] | None:
    """Return the store's address and the key of an object below a store's `folder`; None for other addresses.

    >>> split_at("s3://pictures/2031/images/a.png", IMAGES)
    ('s3://pictures/2031', 'images/a.png')
    >>> split_at("s3://pictures/a.png", IMAGES)
    """
    store, _, rest = uri.rpartition(f"/{folder}")
    return (store, f"{folder}{rest}") if store else None


def is_s3(url: str) -> bool:
    """Return whether an address is that of a bucket, or of an object in one."""
    return url[: len(_S3)].lower() == _S3


def s3_uri(bucket: str, key: str = "") -> str:
    """Return the address of a bucket, or of an object in it.

    >>> s3_uri("pictures"), s3_uri("pictures", "a.png")
    ('s3://pictures/', 's3://pictures/a.png')
    """
    return f"{_S3}{bucket}/{key}"


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """Return the parts of a normalised S3 address; the prefix has no slash at either end.

    >>> bucket_and_prefix("s3://pictures/2031/may")
    ('pictures', '2031/may')
    """
    bucket, _, prefix = url[len(_S3) :].partition("/")
    return bucket, prefix


def object_uri(address: str) -> str:
    """Return an object's address with its scheme: `s3://bucket/key`, or `file:///...` for a path of this machine.

    >>> object_uri("/srv/out/a b.png"), object_uri("s3://pictures/a.png")
    ('file:///srv/out/a%20b.png', 's3://pictures/a.png')

    Raises:
        ValueError: that is no address.
    """
    if not is_s3(address):
        return Path(normalised(address)).as_uri()
    if not bucket_and_prefix(address)[1].strip("/"):
        raise ValueError(f"{address!r} names a bucket and no object in it")
    return _S3 + address[len(_S3) :]


def url_path(uri: str) -> str:
    """Return an object's address percent-encoded: keys of S3 are not, file URLs are.

    >>> url_path("s3://bucket/a b/"), url_path("file:///a%20b")
    ('s3://bucket/a%20b', 'file:///a%20b')
    """
    return (quote(uri, safe="/:") if is_s3(uri) else uri).rstrip("/")


def normalised(url: str) -> str:
    """Return an absolute folder, or `s3://bucket/prefix` without a slash at its end.

    >>> normalised("s3://pictures/2031/"), normalised("file:///srv/a%20b"), normalised("/srv/pictures/")
    ('s3://pictures/2031', '/srv/a b', '/srv/pictures')
    >>> normalised("/srv/shop/../pictures")
    '/srv/pictures'

    Raises:
        ValueError: it is neither a folder, nor a file:// URL, nor s3://bucket/prefix.
    """
    if not url.strip() or not url.isprintable():
        raise ValueError("is empty or holds control characters; give a folder or s3://bucket/prefix")
    found = _SCHEME.match(url)
    scheme, beginning = (found[1].lower(), found[0].lower()) if found else ("", "")
    # a folder's name may have a colon
    reader = _READERS.get(beginning if beginning.endswith("//") or scheme in _HINTS else "")
    if reader is None:
        hint = _HINTS.get(scheme, "").format(rest=url.partition(":")[2].strip("/"))
        raise ValueError(
            f"{url!r} is not understood; give a folder, file:///folder or s3://bucket/prefix{hint}"
        )
    return reader(url)


def _from_path(url: str) -> str:
    try:
        path = Path(url).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{url!r}: this machine knows no home of such a user") from None
    straight = Path(path.anchor)
    for part in path.parts[1:]:
        # what is above a symbolic link is above the folder that it leads to
        at = straight.resolve() if part == ".." and straight.is_symlink() else straight
        straight = at.parent if part == ".." else at / part
    return str(straight)


def _from_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise ValueError(f"{url!r} must look like file:///folder, without host, query or fragment")
    return _from_path(unquote(parts.path) or "/")


def _from_s3_url(url: str) -> str:
    bucket, _, prefix = url[len(_S3) :].partition("/")
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
    return s3_uri(bucket, prefix).rstrip("/")


_READERS: Final = {"": _from_path, "file://": _from_file_url, _S3: _from_s3_url}

_MEANT_S3: Final = "; did you mean s3://{rest} ?"
_BY_ENDPOINT: Final = "; of an S3 service, https://host goes into endpoint_url, and the bucket into url"
_ELSEWHERE: Final = "; other services can be used as far as they speak S3, by endpoint_url"
#: What may be meant by an address that begins like this.
_HINTS: Final = {
    **dict.fromkeys(("s3", "s3a", "s3n"), _MEANT_S3),
    **dict.fromkeys(("http", "https"), _BY_ENDPOINT),
    **dict.fromkeys(
        ("gs", "gcs", "az", "abfs", "abfss", "wasb", "wasbs", "r2", "b2", "minio", "oss"), _ELSEWHERE
    ),
    "file": "; a folder may do without file:",
}
