"""Write the gallery: pages to look at a batch's images, whole in themselves, that may be moved with their folder.

A page asks nobody for anything: style, script and thumbnails are in it, its content security policy allows those
by hash and nothing else but images from beside it. Prompts are data for the script, which shows them as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.resources import files
from itertools import groupby, islice
from operator import itemgetter
from string import Template
from typing import Any, Final
from urllib.parse import quote

from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.markdown import Picture
from prefect_ttapi.lineage.report import Totals
from prefect_ttapi.lineage.shown import address, in_bytes, one_line
from prefect_ttapi.results import StoredImage
from prefect_ttapi.storage.layout import is_s3, page_name, url_path

#: Cards on one page: an image each, or a row without images.
CARDS: Final = 500

#: Characters that one text may bring onto a page. Legal prompts are shorter.
LONGEST: Final = 40_000


def pages(
    rows: Iterable[Row],
    thumbnail_of: Callable[[StoredImage], bytes | None],
    totals: Totals,
    *,
    title: str,
    folder_uri: str,
    store_uri: str,
    manifest: str | None = None,
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield the gallery's pages, one after the other: file name and the pieces of the HTML, the first one `index.html`.

    A page's pieces are made as they are read, a card at a time; it must be read before the next one is asked for.

    Args:
        rows: of the whole batch, in order; read once.
        thumbnail_of: a WebP of an image, about 256 pixels wide, or None; asked when its card is made.
        totals: of exactly these rows.
        title: the batch's name.
        folder_uri: where the pages will lie.
        store_uri: images below it get links relative to the pages, so that all can be moved together.
        manifest: the manifest's file name in the pages' folder.
    """
    cards = ((row, image) for row in rows for image in row.images or (None,))
    count = max(1, -(-(totals.images + totals.without_images) // CARDS))
    names = [page_name(number) for number in range(1, count + 1)]
    links = _Links(folder_uri, store_uri)
    for number, name in enumerate(names, start=1):
        shown = groupby(islice(cards, CARDS), key=itemgetter(0))
        told = (_row(row, (image for _, image in images), thumbnail_of, links) for row, images in shown)
        yield name, _page(title, totals, told, names, number, manifest)


class _Links:
    """Where a page may link to: relative for what lies in the same store, else what a browser can open."""

    def __init__(self, folder_uri: str, store_uri: str) -> None:
        self._folder = url_path(folder_uri)
        self._store = url_path(store_uri)

    def to(self, uri: str, url: str | None = None) -> str | None:
        path = url_path(uri)
        if path.startswith(self._store + "/"):
            relative = posixpath.relpath(path, self._folder)
            # a name may look like a scheme: "javascript:x.png"
            return relative if relative.startswith("../") else f"./{relative}"
        reachable = url or (None if is_s3(uri) else uri)
        return (address(reachable) or None) if reachable else None


def _row(
    row: Row,
    images: Iterable[StoredImage | None],
    thumbnail_of: Callable[[StoredImage], bytes | None],
    links: _Links,
) -> dict[str, Any]:
    return {
        "row": row.row,
        "status": row.status,
        "prompt": row.prompt[:LONGEST],
        "model": row.model,
        "hash": row.request_hash,
        "error": row.error and row.error[:LONGEST],
        "error_type": row.error_type,
        "notes": row.maybe_paid,
        "tokens": row.usage.total_tokens if row.usage else None,
        "asked": {name: one_line(str(value), 300) for name, value in row.asked.items()},
        "values": {name: value[:LONGEST] for name, value in row.values.items()},
        "origin": {name: fact for name, fact in _origin(row).items() if fact},
        "images": [_image(Picture(row, image, thumbnail_of(image)), links) for image in images if image],
    }


def _origin(row: Row) -> dict[str, str | None]:
    usage, at = row.usage, row.created_at
    return {
        "Answered by": row.api_origin,
        "Answered": f"{at:%Y-%m-%d %H:%M:%S %Z}" if at else None,
        "Tokens": f"{usage.total_tokens:,}: {usage.input_tokens:,} in, {usage.output_tokens:,} out"
        if usage
        else None,
        "API calls": f"{row.api_calls:,}" if row.api_calls else None,
        "Seconds": f"{row.seconds:,.1f}" if row.seconds else None,
        "Paid in flow run": row.flow_run_id,
        "Paid in task run": row.task_run_id,
    }


def _image(picture: Picture, links: _Links) -> dict[str, Any]:
    image = picture.image
    href = links.to(image.uri)
    return {
        "index": image.index,
        "width": image.width,
        "height": image.height,
        "size": in_bytes(image.size_bytes),
        "type": image.media_type,
        "sha256": image.sha256,
        "revised": image.revised_prompt and image.revised_prompt[:LONGEST],
        "uri": image.uri,
        "href": href,
        "beside": bool(href and href.startswith(".")),
        "copies": [{"uri": copy.uri, "href": links.to(copy.uri, copy.url)} for copy in picture.delivered],
        "thumbnail": picture.thumbnail and base64.b64encode(picture.thumbnail).decode(),
    }


def _page(
    title: str,
    totals: Totals,
    rows: Iterable[dict[str, Any]],
    names: list[str],
    number: int,
    manifest: str | None,
) -> Iterator[str]:
    style, script = _part("page.css"), _part("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(one_line(title, 200)),
        "style": style,
        "script": script,
        "lead": html.escape(_lead(totals)),
        "figures": _figures(totals),
        "links": _numbers(names, number),
        "foot": _foot(manifest),
    }
    before, after = _part("page.html").split("$data")
    yield Template(before).substitute(parts)
    yield '{"rows":['
    for position, row in enumerate(rows):
        yield ("," if position else "") + _json(row)
    yield f'],"more":{_json(len(names) > 1)}}}'
    yield Template(after).substitute(parts)


@cache
def _part(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(data: Any) -> str:
    """Return JSON that HTML leaves alone, in ASCII, so that no line separator and no lone surrogate is in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _lead(totals: Totals) -> str:
    told = [
        (totals.generated, "generated in this batch"),
        (totals.cached, "paid for before"),
        (totals.failed, "failed"),
        (totals.skipped, "never sent"),
    ]
    parts = ", ".join(f"{count:,} {what}" for count, what in told if count)
    requests = f"{totals.rows:,} request{'' if totals.rows == 1 else 's'}"
    doubt = (
        f" {totals.maybe_paid:,} may have been paid for without giving images." if totals.maybe_paid else ""
    )
    return f"{requests}: {parts}.{doubt}" if parts else "No requests."


def _figures(totals: Totals) -> str:
    figures = {
        "Images": f"{totals.images:,}",
        "Size": in_bytes(totals.size_bytes),
        "Delivered": f"{totals.delivered:,}" if totals.delivered else "",
        "API calls": f"{totals.api_calls:,}",
        "Tokens": f"{totals.total_tokens:,}" if totals.total_tokens else "",
        "Tokens saved": f"{totals.tokens_saved:,}" if totals.tokens_saved else "",
        "USD": f"{totals.usd:,.2f}" if totals.usd is not None else "",
        "USD saved": f"{totals.usd_saved:,.2f}" if totals.usd_saved is not None else "",
        "Failed": f"{totals.failed:,}" if totals.failed else "",
    }
    return "".join(
        f"<div{' class=bad' if name == 'Failed' else ''}><dt>{name}</dt><dd>{figure}</dd></div>"
        for name, figure in figures.items()
        if figure
    )


def _numbers(names: list[str], current: int) -> str:
    if len(names) == 1:
        return ""
    links = "".join(
        f"<b aria-current=page>{number}</b>" if number == current else f'<a href="./{name}">{number}</a>'
        for number, name in enumerate(names, start=1)
    )
    return f'<nav class="pages" aria-label="Pages">{links}</nav>'


def _foot(manifest: str | None) -> str:
    link = f'<a href="./{html.escape(quote(manifest))}">{html.escape(manifest)}</a>' if manifest else ""
    return f"Every request, with all that is known of it, is a line of {link}." if link else ""
