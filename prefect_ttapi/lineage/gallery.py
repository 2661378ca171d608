"""Write the gallery: self-contained pages that show a batch's images, and that may be moved with their folder.

A page asks nobody for anything: style, script and thumbnails are in it, its content security policy allows those
by hash and nothing else but images and pages from beside it. Prompts are data for the script, which shows them as text.
Where there are several pages, they search each other in a frame: `search.html` knows a few words of every card, and
answers by message, which works from a disk as well.

The thumbnails are also all in one zip beside the manifest, from which a later batch takes them again. Pictures are
stored in it as they are, each named after the SHA-256 of the image it shows. A zip in a store is read only where all of
its entries have that one shape: anything else is not ours, and no thumbnail.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import logging
import os
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from itertools import groupby, islice, pairwise
from operator import itemgetter
from string import Template
from typing import Any, BinaryIO, Final, Self
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.markdown import figures, origin
from prefect_ttapi.lineage.report import Totals
from prefect_ttapi.lineage.shown import REASON, address, counted, in_bytes, one_line
from prefect_ttapi.results import DeliveredImage, StoredImage
from prefect_ttapi.storage.layout import MANIFEST, SEARCH, is_s3, page_name, url_path
from prefect_ttapi.storage.store import ImageStore

logger: Final = logging.getLogger(__name__)

#: Cards on one page: an image each, or a row without images.
CARDS: Final = 500

#: Figures at the head of a page, after the number of images; those that are 0 are left out.
_FIGURES: Final = (
    *("size", "delivered", "with credentials", "without credentials"),
    *("API calls", "tokens", "tokens saved", "USD", "USD saved", "failed"),
)

#: Characters that one text may bring onto a page. Legal prompts are shorter.
LONGEST: Final = 40_000

#: Bytes of one thumbnail, and of a zip of them.
LARGEST: Final = 0xFFFF
LARGEST_ZIP: Final = 0x7FFF_FFFF

#: Characters of a text that all pages can be searched for.
_SEARCHED: Final = 160

#: Links to pages beside the current one, besides the first and the last.
_NEAR: Final = 3

_NAME: Final = re.compile(r"[0-9a-f]{64}\.webp")


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pages of a batch, and what they tell of it besides its rows.

    Attributes:
        title: the batch's name.
        totals: of exactly the rows that are shown.
        thumbnails: of their images, about 256 pixels wide; each is asked for when its card is made.
        made: when the batch ended.
        run_id: the flow run that it belongs to.
        run_url: where a browser finds that, if it does.
        folder_uri: where the pages will lie.
        store_uri: images below it get links relative to the pages, so that all can be moved together.
    """

    title: str
    totals: Totals
    thumbnails: ThumbnailPack
    made: datetime
    run_id: str
    run_url: str | None
    folder_uri: str
    store_uri: str

    def pages(self, rows: Iterable[Row]) -> Iterator[tuple[str, Iterator[str]]]:
        """Yield one page after the other: file name and the pieces of the HTML, the first one `index.html`.

        Of several pages, the last one is what they search each other by.
        A page's pieces are made as they are read, a card at a time; it must be read before the next one is asked for.

        Args:
            rows: of the whole batch, in order; read once.
        """
        cards = ((row, image) for row in rows for image in row.images or (None,))
        count = max(1, -(-(self.totals.images + self.totals.without_images) // CARDS))
        names = [page_name(number) for number in range(1, count + 1)]
        found = Spool(hashing=False)
        for number, name in enumerate(names, start=1):
            shown = groupby(islice(cards, CARDS), key=itemgetter(0))
            told = (self._row(row, (image for _, image in images if image)) for row, images in shown)
            yield name, self._page(_remembered(told, name, found), names, number)
        if count > 1:
            yield SEARCH, _search(found)

    def _page(self, rows: Iterable[dict[str, Any]], names: list[str], number: int) -> Iterator[str]:
        style, script = _part("page.css"), _part("page.js")
        frames = "frame-src 'self' file:; " if len(names) > 1 else ""
        policy = (
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
            f"img-src 'self' file: data:; {frames}base-uri 'none'; form-action 'none'"
        )
        parts = {
            "policy": policy,
            "title": html.escape(one_line(self.title, 200)),
            "style": style,
            "script": script,
            "lead": html.escape(_lead(self.totals)),
            "when": f"{self.made:%-d %B %Y, %H:%M} UTC",
            "run": self._run(),
            "figures": _figures(self.totals),
            "links": _numbers(names, number),
            "manifest": MANIFEST,
        }
        before, after = _part("page.html").split("$data")
        yield Template(before).substitute(parts)
        yield '{"rows":['
        for position, row in enumerate(rows):
            yield ("," if position else "") + _json(row)
        yield f'],"pages":{len(names)}}}'
        yield Template(after).substitute(parts)

    def _run(self) -> str:
        run, to = f"run {html.escape(self.run_id)}", html.escape(address(self.run_url or ""))
        return f'<a href="{to}" target="_blank" rel="noopener">{run}</a>' if to else run

    def _row(self, row: Row, images: Iterable[StoredImage]) -> dict[str, Any]:
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
            "values": {name: value[:LONGEST] for name, value in row.values.items() if value is not None},
            "origin": origin(row),
            "images": [self._image(image, row.copies(image)) for image in images],
        }

    def _image(self, image: StoredImage, copies: Iterable[DeliveredImage]) -> dict[str, Any]:
        href = self._link(image.uri)
        thumbnail = self.thumbnails.get(image.sha256)
        return image.model_dump(include={"index", "width", "height", "sha256", "uri", "marks"}) | {
            "size": in_bytes(image.size_bytes),
            "type": image.media_type,
            "revised": image.revised_prompt and image.revised_prompt[:LONGEST],
            "href": href,
            "beside": bool(href and href.startswith(".")),
            "signature": image.signature and one_line(image.signature, REASON),
            "copies": [{"uri": copy.uri, "href": self._link(copy.uri, copy.url)} for copy in copies],
            "thumbnail": thumbnail and base64.b64encode(thumbnail).decode(),
        }

    def _link(self, uri: str, url: str | None = None) -> str | None:
        """Return where a page may link to: relative for what lies in the same store, else what a browser can open."""
        path = url_path(uri)
        if path.startswith(url_path(self.store_uri) + "/"):
            relative = posixpath.relpath(path, url_path(self.folder_uri))
            # a name may look like a scheme: "javascript:x.png"
            return relative if relative.startswith("../") else f"./{relative}"
        reachable = url or ("" if is_s3(uri) else uri)
        return address(reachable) or None


def _remembered(rows: Iterable[dict[str, Any]], page: str, found: Spool) -> Iterator[dict[str, Any]]:
    """Yield the rows, and write to `found` the words by which each card is searched for."""
    for row in rows:
        words = [row["values"].get("name"), row["prompt"], row["model"], row["error_type"], row["hash"]]
        short = [(word or "")[:_SEARCHED] for word in words]
        for image in row["images"] or [None]:
            card = f"{row['row']}.{image['index'] if image else 0}"
            marks = image and image["marks"]
            found.write((_json([page, card, row["status"], *short, marks]) + "\n").encode())
        yield row


def _search(found: Spool) -> Iterator[str]:
    """Yield the page that finds cards on all pages, a line at a time."""
    script = _part("search.js")
    before, after = _part("search.html").split("$data")
    parts = {"policy": f"default-src 'none'; script-src {_hash(script)}; base-uri 'none'", "script": script}
    yield Template(before).substitute(parts)
    with found.open() as lines:
        for number, line in enumerate(lines):
            yield ("," if number else "[") + line.decode()
    yield "]"
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
    doubt = (
        f" {totals.maybe_paid:,} may have been paid for without giving images." if totals.maybe_paid else ""
    )
    return f"{counted(totals.rows, 'request')}: {parts}.{doubt}" if parts else "No requests."


def _figures(totals: Totals) -> str:
    told = figures(totals)
    shown = [("images", f"{totals.images:,}"), *((name, told[name]) for name in _FIGURES if name in told)]
    return "".join(
        f"<div{' class=bad' if name == 'failed' else ''}><dt>{name[0].upper()}{name[1:]}</dt><dd>{figure}</dd></div>"
        for name, figure in shown
        if figure != "0"
    )


def _numbers(names: list[str], current: int) -> str:
    if len(names) == 1:
        return ""
    near = range(max(1, current - _NEAR), min(len(names), current + _NEAR) + 1)
    links = ""
    for before, number in pairwise([0, *sorted({1, *near, len(names)})]):
        links += "<i>&hellip;</i>" if number > before + 1 else ""
        link = f'<a href="./{names[number - 1]}">{number}</a>'
        links += f"<b aria-current=page>{number}</b>" if number == current else link
    return f'<nav class="pages" aria-label="Pages">{links}</nav>'


class ThumbnailPack:
    """Read the thumbnails that an earlier batch left in a store; safe from all threads. Each takes 600 bytes of memory.

    Args:
        file: of the zip; it is closed with the pack.

    Raises:
        ValueError: it is no zip as `ThumbnailFile` writes it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        try:
            self._zip = _of_thumbnails(file)
        except Exception as error:  # zipfile raises whatever a damaged file makes it stumble over
            file.close()
            raise ValueError(f"it is no zip of thumbnails: {error}") from None

    @classmethod
    def of(cls, store: ImageStore, uri: str) -> Self | None:
        """Return the pack at `uri` in `store`, or None where there is none, or none that can be used."""
        try:
            return None if (store.size(uri) or 0) > LARGEST_ZIP else cls(store.open(uri))
        except ImageMissingError:
            return None
        except (StoreError, ValueError) as error:
            logger.warning("The thumbnails in %s can't be used: %s", uri, error)
            return None

    def get(self, sha256: str) -> bytes | None:
        """Return the thumbnail of an image, or None where there is none, or a damaged one."""
        try:
            webp = self._zip.read(f"{sha256}.webp")
        except Exception:  # zipfile raises whatever a damaged file makes it stumble over
            return None
        return webp if webp[:4] == b"RIFF" and webp[8:12] == b"WEBP" else None

    def close(self) -> None:
        """Close the file; no thumbnail can be read any more."""
        self._zip.close()
        self._file.close()


class ThumbnailFile(ThumbnailPack):
    """Collect thumbnails in a temporary file; used by one thread. Each takes 450 bytes of memory.

    >>> thumbnails = ThumbnailFile()
    >>> thumbnails.add("ab" * 32, b"RIFF....WEBP")
    >>> thumbnails.get("ab" * 32), thumbnails.get("cd" * 32)
    (b'RIFF....WEBP', None)
    >>> thumbnails.close()
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ttapi-")  # noqa: SIM115 - closed by `close`
        self._zip = ZipFile(self._file, "w")

    def __len__(self) -> int:
        return len(self._zip.infolist())

    def add(self, sha256: str, webp: bytes) -> None:
        """Keep the thumbnail of an image, unless there is one already, or it is too large."""
        name = f"{sha256}.webp"
        if len(webp) <= LARGEST and _NAME.fullmatch(name) and name not in self._zip.NameToInfo:
            # of the zip's first day: equal thumbnails are equal bytes
            self._zip.writestr(ZipInfo(name), webp)

    def open(self) -> BinaryIO:
        """Return a reader of the zip, of which there may be one at a time; nothing can be added afterwards."""
        if self._zip.mode == "w":
            self._zip.close()
            self._zip = ZipFile(self._file)
        reader = os.fdopen(os.dup(self._file.fileno()), "rb")
        reader.seek(0)
        return reader


def _of_thumbnails(file: BinaryIO) -> ZipFile:
    opened = ZipFile(file)
    entries = opened.infolist()
    if not all(map(_is_ours, entries)) or (entries and entries[0].header_offset):
        raise ValueError("other things are in it")
    return opened


def _is_ours(entry: ZipInfo) -> bool:
    stored = entry.compress_type == ZIP_STORED and entry.compress_size == entry.file_size <= LARGEST
    plain = not (entry.flag_bits or entry.extra or entry.comment) and entry.date_time == (1980, 1, 1, 0, 0, 0)
    return stored and plain and bool(_NAME.fullmatch(entry.filename))
