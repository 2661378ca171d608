"""Write the artifacts' text: no run is needed to build it, and no artifact grows with the batch.

What comes from outside stands in HTML blocks, which have no blank lines in them: there, both of Prefect's UIs
read the escapes of `inert`. Markdown around them holds numbers and words of our own only.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final
from urllib.parse import unquote, urlsplit

from prefect_ttapi.images.renditions import ARTIFACT_BOX, GALLERY_BOX, as_data_uri, thumbnail_or_none
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.report import BatchReport, Totals
from prefect_ttapi.lineage.shown import (
    ADDRESS,
    CAPTION,
    CELL,
    REASON,
    StoreLinks,
    address,
    cell,
    counted,
    in_bytes,
    inert,
    one_line,
)
from prefect_ttapi.results import PartialImage, StoredImage
from prefect_ttapi.storage.layout import BATCHES


@dataclass(frozen=True)
class Picture:
    """One image of a row.

    Attributes:
        row: the request it answers.
        image: where it is stored.
        thumbnail: a small WebP of it, or None where none could be made.
    """

    row: Row
    image: StoredImage
    thumbnail: bytes | None = None

    @property
    def uris(self) -> list[str]:
        """The addresses of its copies under the names consumers know; where there are none, that of the image."""
        return [copy.uri for copy in self.row.copies(self.image)] or [self.image.uri]

    @property
    def uri(self) -> str:
        """The address to look at: a delivered copy's public one, else that copy's, else the stored one."""
        public = (copy.url for copy in self.row.copies(self.image) if copy.url)
        return next(public, self.uris[0])


#: The most that one artifact shows of a batch.
FAILURES: Final = 20
PICTURES: Final = 60
TABLE_ROWS: Final = 1_000
COLUMNS: Final = 4

#: Digits of a hash: enough to find it by.
SHORT: Final = 12


def batch_markdown(
    report: BatchReport, failures: Iterable[Row], pictures: Iterable[Picture], links: StoreLinks
) -> str:
    """Return the artifact of a batch: totals, failures with their reasons, thumbnails that link to the images.

    Args:
        report: of the batch.
        failures: failed rows; 20 are taken.
        pictures: images with thumbnails of 180 pixels; 60 are taken.
        links: where a browser finds images, page and manifest.
    """
    totals = report.totals
    doubt = f"**{counted(totals.maybe_paid, 'request')} may have been paid for without giving images.**"
    notes = filter(None, [*report.notes, report.waiting, report.unchanged])
    parts = [
        f"## {counted(totals.images, 'image')} for {counted(totals.rows, 'request')}",
        _block("p", f"<strong>{_shown(report.name)}</strong>"),
        _opening(report.gallery_uri, links) if report.gallery_uri else "",
        _totals(totals),
        doubt if totals.maybe_paid else "",
        *[_block("p", _shown(note, REASON)) for note in notes],
        *_failures(totals, list(islice(failures, FAILURES))),
        *_gallery(totals.images, list(islice(pictures, PICTURES)), links),
        *_speed(totals),
        _places({"Gallery": report.gallery_uri, "Manifest": report.manifest_uri}, links),
        *links.notes(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def delivery_markdown(
    row: Row, pictures: Sequence[Picture], links: StoreLinks, request_id: str | None
) -> str:
    """Return the artifact of one delivery: what was asked, who answered, what it cost, where each image is.

    Args:
        row: the answered request.
        pictures: its images with thumbnails of 180 pixels, no more than are to be shown.
        links: where a browser finds the images.
        request_id: the API's id of the call, where it sent one.
    """
    asked = {name: value for name, value in row.asked.items() if name not in ("model", "user")}
    facts = {
        "Prompt": row.prompt,
        "Model": row.model,
        "Asked for": ", ".join(f"{name} {value}" for name, value in asked.items()),
        "Request hash": row.request_hash,
        "API request id": request_id,
        **origin(row),
    }
    parts = [
        f"## {counted(len(row.images), 'image')}",
        _table(
            [f"<th>{title}</th>", f"<td>{_shown(fact, REASON)}</td>"] for title, fact in facts.items() if fact
        ),
        *_gallery(len(row.images), pictures, links),
        *_copies(pictures, links),
        *links.notes(),
    ]
    return "\n\n".join(parts) + "\n"


def image_table(rows: Iterable[Row], manifest_uri: str, limit: int = TABLE_ROWS) -> list[dict[str, object]]:
    """Return the table artifact: a row for each image, with the same columns in every row.

    Args:
        rows: of the batch, in order; read only as far as shown.
        manifest_uri: named in a last row where there are more than `limit` images; a web address is a link.
        limit: of rows in the table.
    """
    lines = list(islice(_lines(rows), limit + 1))
    if len(lines) <= limit:
        return lines
    nothing: dict[str, object] = dict.fromkeys(lines[0], "")
    place = address(manifest_uri) if manifest_uri.startswith("http") else cell(manifest_uri)
    return [*lines[:limit], nothing | {"delivered": place, "prompt": "more in the manifest"}]


def _lines(rows: Iterable[Row]) -> Iterator[dict[str, object]]:
    for row in rows:
        for image in row.images:
            yield {
                "name": cell(one_line(str(row.values.get("name") or ""), CELL)),
                "delivered": cell(one_line(Picture(row, image).uri, ADDRESS)),
                "row": row.row,
                "status": row.status,
                "prompt": cell(one_line(row.prompt, CELL)),
                "model": cell(row.model),
                "tokens": row.usage.total_tokens if row.usage else None,
                "image": image.sha256[:SHORT],
                "request": (row.request_hash or "")[:SHORT],
            }


def origin(row: Row) -> dict[str, str]:
    """Return who answered a request, when, and what it cost, as far as that is known."""
    usage, at = row.usage, row.created_at
    tokens = usage and f"{usage.total_tokens:,}: {usage.input_tokens:,} in, {usage.output_tokens:,} out"
    facts = {
        "Answered by": row.api_origin,
        "Answered": at and f"{at:%Y-%m-%d %H:%M:%S %Z}",
        "Tokens": tokens,
        "API calls": row.api_calls and f"{row.api_calls:,}",
        "Seconds": row.seconds and f"{row.seconds:,.1f}",
        "Paid in flow run": row.flow_run_id,
        "Paid in task run": row.task_run_id,
    }
    return {name: str(fact) for name, fact in facts.items() if fact}


def figures(totals: Totals) -> dict[str, str]:
    """Return what a batch came to, in the words of its artifact and its pages; money only where there is a price."""
    counts = {
        "generated": totals.generated,
        "cached": totals.cached,
        "failed": totals.failed,
        "skipped": totals.skipped,
        "API calls": totals.api_calls,
        "tokens": totals.total_tokens,
        "tokens saved": totals.tokens_saved,
        "delivered": totals.delivered,
        "with credentials": totals.with_credentials or None,
        "without credentials": (totals.with_credentials and totals.without_credentials) or None,
    }
    money = {"USD": totals.usd, "USD saved": totals.usd_saved}
    return {
        **{name: f"{count:,}" for name, count in counts.items() if count is not None},
        **{name: f"{usd:,.2f}" for name, usd in money.items() if usd is not None},
        "size": in_bytes(totals.size_bytes),
    }


def _totals(totals: Totals) -> str:
    told = figures(totals)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (told, ["---:"] * len(told), told.values()))


def _opening(gallery_uri: str, links: StoreLinks) -> str:
    """Say how to open the gallery: by a link where a browser can follow it from Prefect's page, else by a command."""
    page = links.to(gallery_uri)
    if page.startswith(("http://", "https://")):
        return _block("p", f"<strong>{_link(page, 'Open the gallery')}</strong>")
    store, _, rest = gallery_uri.rpartition(f"/{BATCHES}")
    path = unquote(urlsplit(store).path) if store.startswith("file:") else store
    command = f"prefect-ttapi open {shlex.quote(path)} {shlex.quote(rest.rpartition('/')[0])}"
    return _block("p", f"To open the gallery: <code>{_shown(command, ADDRESS)}</code>")


def _speed(totals: Totals) -> list[str]:
    """Say how long answers took, by model, and how many requests were side by side."""
    told = [
        [f"<td>{_shown(model)}</td>", *(f"<td>{took[share]:g} s</td>" for share in ("p50", "p90", "p99"))]
        for model in sorted(totals.latencies)
        if (took := totals.latency(model))
    ]
    if not told:
        return []
    head = "<th>answers within</th><th>50 %</th><th>90 %</th><th>99 %</th>"
    beside = f"On average, {totals.concurrency:.1f} requests were under way." if totals.concurrency else ""
    return ["### Time", _table(told, header=head), beside]


def _failures(totals: Totals, failures: Sequence[Row]) -> list[str]:
    if not totals.errors:
        return []
    reasons = ", ".join(
        f"{_shown(kind)} {count:,}" for kind, count in sorted(totals.errors.items(), key=lambda of: -of[1])
    )
    told = [
        [
            f"<td>{row.row}</td>",
            f'<td dir="auto">{_shown(row.prompt)}</td>',
            f"<td>{_shown(row.error or row.error_type or '', REASON)}</td>",
        ]
        for row in failures
    ]
    more = totals.failed - len(told)
    return [
        f"### {totals.failed:,} failed, {totals.skipped:,} skipped",
        _block("p", reasons),
        _table(told, header="<th>row</th><th>prompt</th><th>reason</th>") if told else "",
        f"and {more:,} more in the manifest" if told and more > 0 else "",
    ]


def _gallery(images: int, pictures: Sequence[Picture], links: StoreLinks) -> list[str]:
    if not pictures:
        return []
    shown = "" if images <= len(pictures) else f", the first {len(pictures)}"
    cells = [_cell(picture, links) for picture in pictures]
    return [
        f"### Images{shown}",
        _table(cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)),
    ]


def _cell(picture: Picture, links: StoreLinks) -> str:
    image, prompt = picture.image, _shown(picture.row.prompt)
    small = (
        f'<img width="{_wide(image)}" alt="{prompt}" src="{as_data_uri(picture.thumbnail)}">'
        if picture.thumbnail
        else f"{image.width} x {image.height}"
    )
    facts = f"{_shown(picture.row.model)}, {picture.row.status}"
    caption = f'<span dir="auto">{prompt}</span><br>{facts}'
    return (
        f'<td width="{100 // COLUMNS}%" valign="top">{_link(links.to(picture.uri), small)}<br>{caption}</td>'
    )


def _wide(image: StoredImage) -> int:
    """Return the width of an image's thumbnail."""
    return max(1, round(ARTIFACT_BOX * min(1, image.width / image.height)))


def _copies(pictures: Iterable[Picture], links: StoreLinks) -> Iterator[str]:
    for picture in pictures:
        image = picture.image
        size = f"{image.width} x {image.height}, {in_bytes(image.size_bytes)}"
        places = [_linked(uri, links) for uri in picture.uris]
        yield _block("p", "<br>\n".join([*places, f"{size}, sha256 <code>{_shown(image.sha256)}</code>"]))


def _places(uris: dict[str, str | None], links: StoreLinks) -> str:
    """Say where to look further; an address that a page can't open is still there to be copied."""
    return _block("p", "<br>\n".join(f"{title}: {_linked(uri, links)}" for title, uri in uris.items() if uri))


def _link(uri: str, shown: str) -> str:
    to = address(uri)
    return f'<a href="{inert(to)}">{shown}</a>' if to else shown


def _linked(uri: str, links: StoreLinks) -> str:
    return _link(links.to(uri), _shown(uri, ADDRESS))


def _table(rows: Iterable[Sequence[str]], header: str = "") -> str:
    head = f"<thead><tr>{header}</tr></thead>\n" if header else ""
    return _block('table cellpadding="6"', head + "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows))


def _block(tag: str, inner: str) -> str:
    return f"<{tag}>\n{inner}\n</{tag.partition(' ')[0]}>"


def _shown(text: str, limit: int = CAPTION) -> str:
    return inert(one_line(text, limit))


def preview_markdown(caption: str, preview: PartialImage) -> str:
    """Return the artifact of a picture that is not finished yet."""
    webp = thumbnail_or_none(preview.spool.open, GALLERY_BOX)
    picture = f'<img width="{GALLERY_BOX}" src="{as_data_uri(webp)}">' if webp else "no picture"
    block = _block("p", f'{picture}<br>\n<span dir="auto">{_shown(caption)}</span>')
    return f"## Preview {preview.index + 1}\n\n{block}\n"
