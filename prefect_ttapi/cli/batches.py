"""The commands `ls` and `open`: which batches a store holds, and a batch's gallery in a browser."""

from __future__ import annotations

import json
import secrets
import sys
import webbrowser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from prefect_ttapi.capabilities import Model
from prefect_ttapi.cli.reporting import Progress, complain, place, say, show_table, side_by_side
from prefect_ttapi.cli.stores import prices_of, standing_store
from prefect_ttapi.errors import ImageMissingError, StoreError
from prefect_ttapi.generation.budget import Price
from prefect_ttapi.images.headers import EXTENSIONS
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.lineage.report import Totals, Unchanged
from prefect_ttapi.storage import layout
from prefect_ttapi.storage.objects import Listed
from prefect_ttapi.storage.store import ImageStore

#: Seconds that a signed link lives.
_SIGNED: Final = 3600


@dataclass(frozen=True)
class Batch:
    """A batch of a store.

    Attributes:
        folder: its folder, `batches/<flow run>` and so on.
        written: when its last file was written, UTC.
        files: its files: those of a batch that was killed are its parts alone.
        name: what it was called; empty where the store does not say.
        unchanged: what it left, where it changed nothing since an earlier one.
    """

    folder: str
    written: datetime
    files: tuple[Listed, ...]
    name: str = ""
    unchanged: Unchanged | None = None

    @property
    def id(self) -> str:
        """What a command line calls it by: the flow run's id, and what follows."""
        return self.folder.removeprefix(layout.BATCHES)

    @property
    def manifest(self) -> str | None:
        """The key of its own manifest; None of a batch that has none: it changed nothing, runs, or was killed."""
        return self._own(layout.MANIFEST)

    @property
    def rows_at(self) -> str:
        """The key of the manifest with its rows, or with those that they are the same as."""
        return f"{self.unchanged.same_as if self.unchanged else self.folder}/{layout.MANIFEST}"

    @property
    def page(self) -> str | None:
        """The key of its gallery's first page, or of the batch's that it refers to; None where there is none."""
        name = layout.page_name(1)
        return f"{self.unchanged.same_as}/{name}" if self.unchanged else self._own(name)

    @property
    def state(self) -> str:
        """What became of it, in words."""
        return "ended" if self.manifest else "unchanged" if self.unchanged else "running, or killed"

    @property
    def parts(self) -> list[Listed]:
        """Its parts."""
        return [file for file in self.files if file.key.startswith(f"{self.folder}/{layout.PARTS}")]

    def _own(self, name: str) -> str | None:
        key = f"{self.folder}/{name}"
        return key if any(file.key == key for file in self.files) else None


def batches_of(store: ImageStore, run_id: str | None = None) -> list[Batch]:
    """Return the batches of a store, or of one run, the newest first. StoreError: it can't be listed."""
    files: dict[str, list[Listed]] = {}
    names: dict[str, str] = {}
    for listed in store.list(layout.run_folder(run_id) if run_id else layout.BATCHES):
        if listed.key.startswith(layout.LATEST):
            names |= _names(store, listed.key)
        elif layout.run_in(listed.key):
            folder = listed.key.rpartition("/")[0].removesuffix(f"/{layout.PARTS.rstrip('/')}")
            files.setdefault(folder, []).append(listed)
    batches = side_by_side(lambda folder: _batch(store, folder, files[folder], names.get(folder, "")), files)
    return sorted(batches, key=lambda batch: batch.written, reverse=True)


def _batch(store: ImageStore, folder: str, files: Sequence[Listed], name: str) -> Batch:
    batch = Batch(folder, _written(store, files), tuple(files), name)
    # beside a manifest, what is left is another attempt's
    if batch.manifest or not any(layout.unchanged_in(file.key) for file in files):
        return batch
    left = Unchanged.read(store, folder)
    return replace(batch, unchanged=left, name=left.name) if left else batch


def batch_called(store: ImageStore, wanted: str | None) -> Batch:
    """Return a batch by its id, the beginning of it, or its name; the newest of several, or of all.

    Raises:
        ValueError: there is none, or several could be meant.
    """
    batches = batches_of(store)
    if not batches:
        raise ValueError(f"{store.identity} holds no batches")
    if wanted is None:
        return batches[0]
    wanted = wanted.strip("/").removeprefix(layout.BATCHES)
    same = [batch for batch in batches if wanted in (batch.id, batch.name)]
    begun = [batch for batch in batches if batch.id.startswith(wanted)]
    if same or len(begun) == 1:
        return (same or begun)[0]
    several = f"{len(begun)} batches begin with {wanted}" if begun else f"there is no batch {wanted!r}"
    raise ValueError(f"{several}: prefect-ttapi ls shows which there are")


def _names(store: ImageStore, key: str) -> Mapping[str, str]:
    """Return the names of the folders that a document about the last batches of a name tells."""
    try:
        told = json.loads(store.read(key) or b"{}")
        return dict.fromkeys(map(str, told.get("folders", ())), str(told.get("name", "")))
    except (ValueError, AttributeError, TypeError):
        return {}


def _written(store: ImageStore, files: Sequence[Listed]) -> datetime:
    """Return when the last of the files was written, which not all listings tell."""
    last = max((file.modified for file in files if file.modified is not None), default=None)
    if last is None:
        found = store.objects.look(files[-1].key)
        last = found.modified if found else None
    return datetime.fromtimestamp(last or 0, UTC)


def rows_of(store: ImageStore, batch: Batch) -> Iterator[Row]:
    """Yield the rows of a batch's manifest, or of its parts; what is no row is left out."""
    for line in lines_of(store, batch):
        with suppress(ValueError):
            yield from read_manifest([line])


def without_images(rows: Iterable[Row]) -> Iterator[Row]:
    """Return the rows whose requests lack their images."""
    return (row for row in rows if row.status in ("failed", "skipped"))


def lines_of(store: ImageStore, batch: Batch) -> Iterator[bytes]:
    """Yield the lines of a batch's manifest, or of its parts."""
    if batch.unchanged:
        yield from batch.unchanged.lines(store)
        return
    for key in [batch.manifest] if batch.manifest else [part.key for part in batch.parts]:
        with store.open(store.uri(key)) as lines:
            yield from lines


def totals_of(store: ImageStore, batch: Batch, prices: Mapping[Model, Price]) -> Totals:
    """Return the totals of a batch."""
    if batch.unchanged:
        return batch.unchanged.totals
    totals = Totals()
    for row in rows_of(store, batch):
        price = prices.get(row.request.model) if row.request and row.images else None
        totals = totals.add(row, price.of(len(row.images), row.usage) if price else None)
    return totals


def show(address: str, endpoint_url: str | None, limit: int, prices: Sequence[str], *, as_json: bool) -> None:
    """List the batches of a store."""
    store, known, progress = standing_store(address, endpoint_url), prices_of(prices), Progress(sys.stderr)
    found = batches_of(store)
    batches = found[:limit]
    totals = side_by_side(lambda batch: totals_of(store, batch, known), batches)
    counted = progress.count("reading manifests", totals)
    lines = [_line(*each) for each in zip(batches, counted, strict=True)]
    progress.clear()
    if as_json:
        for line in lines:
            print(json.dumps(line))
    elif not lines:
        say(f"{store.identity} holds no batches yet.")
    else:
        show_table(lines, texts=4, money=bool(known))
        if more := len(found) - len(batches):
            say(f"and {more:,} more: --limit says how many are listed")


def _line(batch: Batch, totals: Totals) -> dict[str, Any]:
    date = f"{batch.written:%Y-%m-%d %H:%M}"
    told = {"batch": batch.id, "date": date, "name": batch.name, "state": batch.state}
    requests, costs = (
        ("rows", "generated", "cached", "failed", "skipped"),
        ("images", "api_calls", "total_tokens"),
    )
    return told | {name: getattr(totals, name) for name in (*requests, *costs, "usd")}


def open_gallery(address: str, endpoint_url: str | None, wanted: str | None, *, only_print: bool) -> None:
    """Open the gallery of a batch in a browser, or print its address.

    A browser can't read a private bucket: its objects are then passed on by this machine, to whoever knows the address.
    """
    store = standing_store(address, endpoint_url)
    batch = batch_called(store, wanted)
    key = batch.page
    if key is None:
        raise ValueError(f"the batch {batch.id} has no gallery page: it runs, or was killed")
    if batch.unchanged:
        say(f"Nothing changed since the batch {batch.unchanged.id}: this is its gallery.")
    uri = store.uri(key)
    reachable = store.public_url(uri) or (None if layout.is_s3(store.url) else uri)
    if only_print:
        print((place(uri) if reachable == uri else reachable) or store.presign(uri, _SIGNED))
        if reachable is None:
            complain(
                "the link ends in an hour and shows the first page only; without --print, all can be seen"
            )
    elif reachable:
        _browse(reachable)
    else:
        # Ctrl-C is how it ends
        with Passing(store) as passing, suppress(KeyboardInterrupt):
            _browse(passing.url(key))
            say("The gallery can be looked at until Ctrl-C ends this command.")
            passing.serve_forever()


def _browse(url: str) -> None:
    print(url, flush=True)
    if not webbrowser.open(url):
        say("There is no browser here: open that address in one.")


_PAGES: Final = {"html": "text/html; charset=utf-8", "js": "text/javascript", "json": "application/json"}
_TYPES: Final = _PAGES | {extension: media_type for media_type, extension in EXTENSIONS.items()}


class Passing(ThreadingHTTPServer):
    """Passes on batches and images of a store to browsers of this machine that know its address."""

    daemon_threads = True

    def __init__(self, store: ImageStore) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.store = store
        self.token = secrets.token_urlsafe(16)

    def url(self, key: str) -> str:
        """Return where a browser finds an object."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/{key}"


class _Request(BaseHTTPRequestHandler):
    server: Passing

    def do_GET(self) -> None:
        _, token, key = (*urlsplit(self.path).path.split("/", 2), "")[:3]
        key = unquote(key)
        legal = key.startswith((layout.BATCHES, layout.IMAGES)) and ".." not in key
        if not (secrets.compare_digest(token.encode(), self.server.token.encode()) and legal):
            self.send_error(404)
            return
        try:
            with self.server.store.open(self.server.store.uri(key)) as file:
                data = file.read()
        except ImageMissingError:
            self.send_error(404)
        except StoreError as error:
            self.send_error(502, explain=str(error))
        else:
            self.send_response(200)
            media_type = _TYPES.get(key.rpartition(".")[2], "application/octet-stream")
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""
