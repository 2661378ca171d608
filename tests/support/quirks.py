"""What S3 services do differently: each quirk as what a proxy in front of moto does to requests and answers."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

from prefect_ttapi.storage.store import ImageStore
from tests.support.meddling import Answer, Meddle, Order, meddling_proxy
from tests.support.s3 import S3Server, said

#: Given method, path and lower-case names of the headers.
When = Callable[[str, str, set[str]], bool]


def a(method: str) -> When:
    return lambda sent, path, _: sent == method and "?" not in path


def listing(method: str, path: str, _: object) -> bool:
    return method == "GET" and "list-type=" in path


def conditional(method: str, _path: str, names: set[str]) -> bool:
    return method == "PUT" and bool(names & {"if-match", "if-none-match"})


def copying(_method: str, _path: str, names: set[str]) -> bool:
    return "x-amz-copy-source" in names


def tagging(_method: str, path: str, _names: object) -> bool:
    return path.endswith("?tagging")


def anything(*_: object) -> bool:
    return True


def on(when: When, order: Order) -> Meddle:
    return lambda method, path, headers: (
        order if when(method, path, {name.lower() for name in headers}) else None
    )


def first(times: int, when: When, order: Order) -> Meddle:
    """Only the first times."""
    left = [order] * times
    return lambda method, path, headers: (
        left.pop() if left and when(method, path, {name.lower() for name in headers}) else None
    )


def changed(pattern: str, by: str | Callable[[re.Match[str]], str]) -> Callable[[Answer], Answer]:
    """Replace in the body."""
    return lambda answer: (*answer[:2], re.sub(pattern, by, answer[2].decode()).encode())


def status_for(status: int, other: Answer) -> Callable[[Answer], Answer]:
    return lambda answer: other if answer[0] == status else answer


def packed(answer: Answer) -> Answer:
    return answer[0], {**answer[1], "Content-Encoding": "gzip"}, gzip.compress(answer[2])


def without_metadata(answer: Answer) -> Answer:
    kept = {name: value for name, value in answer[1].items() if not name.lower().startswith("x-amz-meta-")}
    return answer[0], kept, answer[2]


def ignoring(*names: str) -> Meddle:
    """Take no heed of headers."""

    def meddle(_method: str, _path: str, headers: dict[str, str]) -> Order:
        for name in [name for name in headers if name.lower() in names]:
            del headers[name]
        return None

    return meddle


def tags_as(tell: Callable[[str], str], read: Callable[[str], str], when: When = anything) -> Meddle:
    """Tell tags otherwise, in headers and listings."""

    def told(answer: Answer) -> Answer:
        headers = {
            name: f"{tell(value.strip(chr(34)))}" if name.lower() == "etag" else value
            for name, value in answer[1].items()
        }
        listed = re.compile(rb"(?<=<ETag>&quot;)[^&]*(?=&quot;</ETag>)")
        body = listed.sub(lambda found: tell(found[0].decode()).strip('W/"').encode(), answer[2])
        return answer[0], headers, body

    def meddle(method: str, path: str, headers: dict[str, str]) -> Order:
        for name in [name for name in headers if name.lower() == "if-match"]:
            headers[name] = read(headers[name].strip('"'))
        return told if when(method, path, set()) else None

    return meddle


def without_md5(method: str, _path: str, headers: dict[str, str]) -> Order:
    """Where objects are locked, each body is to have its MD5."""
    names = {name.lower() for name in headers}
    has_body = int(headers.get("Content-Length") or 0) > 0
    refused = method in ("PUT", "POST") and has_body and "content-md5" not in names
    return said("InvalidRequest", 400) if refused else None


def with_checksum(_method: str, _path: str, headers: dict[str, str]) -> Order:
    """AWS's own checksums are not known everywhere."""
    names = "".join(name.lower() for name in headers)
    return said("NotImplemented", 501) if re.search("x-amz-(checksum|sdk-checksum|trailer)", names) else None


def its_first_page_again() -> Meddle:
    """A listing without tokens, deaf to `start-after`."""
    pages: list[Answer] = []

    def again(answer: Answer) -> Answer:
        pages.append(changed("<NextContinuationToken>.*?</NextContinuationToken>", "")(answer))
        return pages[0]

    return on(listing, again)


PAGE = (200, {"Content-Type": "text/html"}, b"<!doctype html><p>Sign in<br>")

#: Each quirk, made anew for each store.
QUIRKS: dict[str, Callable[[], Meddle]] = {
    # conditional writes
    "conditions: 501": lambda: on(conditional, said("NotImplemented", 501)),
    "conditions: 400 InvalidArgument": lambda: on(conditional, said("InvalidArgument", 400)),
    "conditions: 400 NotImplemented": lambda: on(conditional, said("NotImplemented", 400)),
    "conditions: 304 for 412": lambda: on(conditional, status_for(412, (304, {}, b""))),
    "conditions ignored": lambda: ignoring("if-match", "if-none-match"),
    "If-Match ignored": lambda: ignoring("if-match"),
    "conditions: 409 at times": lambda: first(2, conditional, said("ConditionalRequestConflict", 409)),
    # answers that lack something
    "PUT without ETag": lambda: on(a("PUT"), {"Etag": None, "ETag": None}),
    "PUT of images without ETag": lambda: on(
        lambda method, path, _: method == "PUT" and "/images/" in path, {"Etag": None, "ETag": None}
    ),
    "GET without ETag": lambda: on(a("GET"), {"Etag": None, "ETag": None}),
    "HEAD without ETag": lambda: on(a("HEAD"), {"Etag": None, "ETag": None}),
    "no ETag at all": lambda: on(anything, {"Etag": None, "ETag": None}),
    "listing without ETag": lambda: on(listing, changed("<ETag>.*?</ETag>", "")),
    "listing without dates": lambda: on(listing, changed("<LastModified>.*?</LastModified>", "")),
    "listing without sizes": lambda: on(listing, changed("<Size>.*?</Size>", "")),
    "listing without token": lambda: on(
        listing, changed("<NextContinuationToken>.*?</NextContinuationToken>", "")
    ),
    "listing without token or start-after": its_first_page_again,
    "listing encoded silently": lambda: on(listing, changed("<EncodingType>.*?</EncodingType>", "")),
    "HEAD without Last-Modified": lambda: on(a("HEAD"), {"Last-Modified": None}),
    "metadata dropped": lambda: on(anything, without_metadata),
    # answers in another dress
    "weak tags": lambda: tags_as("W/{}".format, str),
    "weak tags of GET": lambda: tags_as('W/"{}"'.format, str, a("GET")),
    "bare tags": lambda: tags_as(str, str),
    "upper-case tags": lambda: tags_as(lambda tag: f'"{tag.upper()}"', str.lower),
    "tags that are no MD5": lambda: tags_as(lambda tag: f'"{tag[::-1]}"', lambda tag: tag[::-1]),
    "gzip in tags of GET": lambda: tags_as('"{}-gzip"'.format, str, a("GET")),
    "documents packed": lambda: on(lambda method, path, _: method == "GET" and ".json" in path, packed),
    # too busy
    "SlowDown at first": lambda: first(3, anything, said("SlowDown", 503)),
    "429 at first": lambda: first(3, anything, 429),
    "throttled at first": lambda: first(3, anything, said("Throttling", 400)),
    "cut off at first": lambda: first(3, anything, "swallow"),
    # headers
    "MD5 wanted": lambda: without_md5,
    "checksums unknown": lambda: with_checksum,
    "PutObjectTagging unknown": lambda: on(tagging, said("NotImplemented", 501)),
    "x-amz-tagging unknown": lambda: on(
        lambda _method, _path, names: "x-amz-tagging" in names, said("NotImplemented", 501)
    ),
    # copies
    "a copy: 200 with an error inside": lambda: on(copying, said("InternalError", 200)),
    "a copy: 501": lambda: on(copying, said("NotImplemented", 501)),
    "a copy's ETag missing": lambda: on(copying, changed("<ETag>.*?</ETag>", "")),
    # who may, and where
    "another region: 301": lambda: on(
        anything, said("PermanentRedirect", 301, x_amz_bucket_region="eu-west-3")
    ),
    "another region: 400": lambda: on(
        anything, said("AuthorizationHeaderMalformed", 400, "<Region>eu-west-3</Region>")
    ),
    "what is missing is forbidden": lambda: on(
        lambda method, *_: method in ("GET", "HEAD"), status_for(404, said("AccessDenied"))
    ),
    "requesters pay": lambda: on(
        lambda _method, _path, names: "x-amz-request-payer" not in names, said("AccessDenied")
    ),
    "a page for an answer": lambda: on(anything, PAGE),
}


def _together(orders: list[Order]) -> Order:
    """The first that is no change of an answer, else all the changes."""
    asked = [order for order in orders if order]
    changes = [order for order in asked if callable(order)]
    if len(changes) < max(len(asked), 1):
        return next((order for order in asked if not callable(order)), None)
    return lambda answer: reduce(lambda so_far, change: change(so_far), changes, answer)


@dataclass(frozen=True)
class QuirkyServer:
    """A service whose quirks can be chosen: one address, as each takes a client of its own, which is slow to make."""

    server: S3Server
    proxy: Any

    def store(self, *quirks: str, url: str = "", **fields: Any) -> ImageStore:
        """A store at the service, which has these quirks from now on."""
        meddles = [QUIRKS[quirk]() for quirk in quirks]
        self.proxy.meddle = lambda *request: _together([meddle(*request) for meddle in meddles])
        self.proxy.seen.clear()
        settings = self.server.settings(endpoint_url=self.proxy.url)
        return ImageStore(url=url or f"s3://{self.server.new_bucket()}/p", **settings, **fields)

    def plain(self, store: ImageStore) -> ImageStore:
        """The same store without quirks."""
        return store.model_copy(update={"endpoint_url": self.server.url})


@contextmanager
def quirky_server(server: S3Server) -> Iterator[QuirkyServer]:
    """A proxy before the server."""
    with meddling_proxy(server.url, lambda *_: None) as proxy:
        yield QuirkyServer(server, proxy)
