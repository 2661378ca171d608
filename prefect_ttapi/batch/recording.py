"""Write down a batch: rows as they come, then the manifest, the gallery page and artifacts on the run."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, Self

from prefect.settings import get_current_settings

from prefect_ttapi.batch.dispatch import Dispatch
from prefect_ttapi.batch.items import Done
from prefect_ttapi.batch.known import last_folders, remember
from prefect_ttapi.batch.live import Background, Live, Standing
from prefect_ttapi.batch.options import Plan
from prefect_ttapi.capabilities import Model
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.budget import Price
from prefect_ttapi.generation.files import note_of, without_mark
from prefect_ttapi.generation.runs import run_log
from prefect_ttapi.images.renditions import thumbnail_or_none
from prefect_ttapi.images.spool import Body, Spool
from prefect_ttapi.lineage.gallery import Gallery, ThumbnailFile
from prefect_ttapi.lineage.manifest import Mark, Row, RowFile, parquet_of, read_manifest, writes_parquet
from prefect_ttapi.lineage.markdown import Picture, batch_markdown, image_table
from prefect_ttapi.lineage.publishing import Progress, batch_key, publish
from prefect_ttapi.lineage.report import BatchReport, Totals, Unchanged, failed_again
from prefect_ttapi.lineage.shown import CELL, REASON, StoreLinks, one_line
from prefect_ttapi.storage.layout import (
    BATCHES,
    MANIFEST,
    PARQUET,
    PARTS,
    THUMBNAILS,
    UNCHANGED,
    batch_folder,
    page_name,
    part_key,
)
from prefect_ttapi.storage.objects import Facts, waiting
from prefect_ttapi.storage.store import UPLOAD_PATIENCE, ImageStore

logger = logging.getLogger(__name__)

#: Failures that the log tells one by one.
TOLD: Final = 50

#: How many batches each attempt at a flow run has begun in this process.
_BEGUN: Counter[tuple[str, tuple[int, ...]]] = Counter()
_BEGUN_LOCK = threading.Lock()

#: A part is written when so many rows, or seconds, have gathered since the one before.
PART_ROWS: Final = 500
PART_SECONDS: Final = 30.0

#: Page, table and manifest, as a report names them.
_FILES: Final = (page_name(1), PARQUET, MANIFEST)

#: Seconds between looks whether a part is due.
LOOK: Final = 0.5


class Parts(Background):
    """Write rows as they come to `<folder>/parts/000001.jsonl` and so on, in a thread that holds up nobody.

    Args:
        store: where they go.
        folder: of the batch, in `store`.
        rows: of the batch.
        every: rows, and seconds, of a part; while the store is in trouble, only time counts.
    """

    def __init__(
        self,
        store: ImageStore,
        folder: str,
        rows: RowFile,
        every: tuple[int, float] = (PART_ROWS, PART_SECONDS),
    ) -> None:
        super().__init__("ttapi-parts")
        self._store = store
        self._folder = folder
        self._rows = rows
        self._every_rows, self._every_seconds = every

    def remove(self) -> None:
        """Remove all parts, also those of an earlier attempt: the manifest has their rows."""
        try:
            for part in list(self._store.list(f"{self._folder}/{PARTS}")):
                self._store.remove(part.key)
        except StoreError as error:
            logger.info("Part files are left beside the manifest: %s", error)

    def _run(self) -> None:
        number, written = 1, Mark()
        failed = told = False
        due = time.monotonic() + self._every_seconds
        while not self._ended.wait(min(LOOK, self._every_seconds)):
            mark, now = self._rows.mark, time.monotonic()
            enough = mark.rows - written.rows >= self._every_rows and not failed
            if not (enough or now >= due):
                continue
            due = now + self._every_seconds
            try:
                if mark != written:
                    part = self._rows.between(written, mark)
                    key = part_key(self._folder, number)
                    self._store.objects.write(key, part.open, Facts("application/x-ndjson"))
                    number, written, failed = number + 1, mark, False
            except Exception as error:
                if not told:
                    logger.warning("Rows so far could not be written; trying again as more come: %s", error)
                failed = told = True


def folder_of_batch(place: str, attempt: tuple[int, ...]) -> str:
    """Return the folder of a run's next batch: `batches/<place>`, of the second `batches/<place>/2`, and so on.

    Another attempt at the run begins from the first again, and writes over what the attempt before left.
    """
    with _BEGUN_LOCK:
        _BEGUN[place, attempt] += 1
        number = _BEGUN[place, attempt]
    return batch_folder(place, number)


class Recorder(ExitStack):
    """Keep a batch's rows, show its progress, and write down at the end what became of it.

    Rows come from one thread at a time.

    Args:
        store: where manifest and gallery page go.
        plan: of the batch.
        api_origin: who answers.
        total: how many rows there will be, where that is known.
        dispatch: tells how many requests are under way.
    """

    def __init__(
        self,
        store: ImageStore,
        plan: Plan,
        api_origin: str,
        total: int | None = None,
        dispatch: Dispatch | None = None,
    ) -> None:
        super().__init__()
        options = plan.options
        self._store = store
        self._name = options.name
        self._api_origin = api_origin
        self._flow_run_id = plan.run.flow_run_id or plan.run.place
        self._folder = plan.folder
        self._total = total
        self._dispatch = dispatch
        self._prices: Mapping[Model, Price] = (options.budget and options.budget.prices) or {}
        self._links = StoreLinks(options.deliver_to, store)
        self._may_show = options.shown
        self._started = time.monotonic()
        self._totals = Totals()
        self._options = options
        self._signer = options.marking.signer() if options.marking else None
        self._lacking = 0  # delivered files without a mark, or a signature, that is asked for
        self._sent = 0
        self._sending_since = self._started
        self._sending = 0.0
        self._rows = RowFile()
        self._thumbnails = ThumbnailFile()
        self._progress = Progress(batch_key(options.name, "progress"), f"{options.name}: images")
        self._parts = Parts(store, plan.folder, self._rows)
        self._log = run_log()
        shown = one_line(options.name, 60)
        self._live = Live(self._standing, lambda line: self._log.info("%s: %s", shown, line))

    def __enter__(self) -> Self:
        self.enter_context(self._parts)
        self.enter_context(self._live)
        return self

    def add(self, done: Done) -> None:
        """Keep one more row."""
        row = done.row
        self._rows.add(row)
        self._totals = self._totals.add(row, self._price(row))
        options = self._options
        self._lacking += without_mark(row.delivered, options.versions, options.marking, self._signer)
        if row.api_calls:
            now = time.monotonic()
            since = now - row.seconds
            self._sending_since = min(self._sending_since, since) if self._sent else since
            self._sending = now - self._sending_since
            self._sent += 1
        for image, thumbnail in zip(row.images, done.thumbnails, strict=False):
            if thumbnail is not None:
                self._thumbnails.add(image.sha256, thumbnail)
        self._tell(row)
        if self._dispatch is None or not self._dispatch.stop.cancelled:
            # afterwards, a server that Ctrl-C has reached as well would be waited for, and rows are in a hurry
            standing = self._standing()
            self._progress.update(standing.done, self._total, standing.line())

    def finish(self, notes: Sequence[str] = (), waiting: tuple[int, Path | None] = (0, None)) -> BatchReport:
        """Write thumbnails, pages and manifest, publish the artifacts, and report.

        Args:
            notes: what the report is to tell besides; that delivered files lack a mark is told in any case.
            waiting: how many answers are in the rescue folder, and where that is.
        """
        notes = [*notes, *([note_of(self._lacking)] if self._lacking else [])]
        with closing(self._thumbnails):
            same_as = self._reference()
            if same_as is None:
                gallery, table, manifest = self._write_all()
            else:
                gallery, table, manifest = (self._store.uri(f"{same_as}/{name}") for name in _FILES)
            if (untold := self._totals.failed - TOLD) > 0:
                self._log.warning("%d more requests failed, see %s", untold, manifest)
            self._parts.end()
            self._parts.remove()
            rescued, folder = waiting
            report = BatchReport(
                name=self._name,
                flow_run_id=self._flow_run_id,
                totals=self._totals,
                manifest_uri=manifest,
                parquet_uri=table if same_as is None or writes_parquet() else None,
                gallery_uri=gallery,
                same_as=same_as and same_as.removeprefix(BATCHES),
                reference_uri=same_as and self._store.uri(f"{self._folder}/{UNCHANGED}"),
                seconds=round(time.monotonic() - self._started, 3),
                notes=tuple(notes),
                rescued=rescued,
                rescue_folder=str(folder) if folder else None,
            ).with_store(self._store)
            for note in filter(None, (*report.notes, report.waiting)):
                self._log.warning("%s: %s", one_line(self._name, 60), note)
            self._publish(report)
            return report

    def remember(self, report: BatchReport) -> None:
        """Note the folder with the batch's rows for the next batch of the name."""
        folder = f"{BATCHES}{report.same_as}" if report.same_as else self._folder
        remember(self._store, self._name, self._api_origin, folder, with_prompts=self._may_show.prompts)

    def _reference(self) -> str | None:
        """Leave nothing but a reference, where nothing has changed; return the folder of the batch that it leads to."""
        try:
            found = self._unchanged_since()
            if found is None:
                return None
            earlier, again = found
            left = Unchanged(
                same_as=earlier,
                failed_again=tuple(read_manifest(again)),
                name=self._name,
                api_origin=self._api_origin,
                ended=datetime.now(UTC),
                totals=self._totals,
            )
            self._upload(UNCHANGED, lambda: io.BytesIO(left.model_dump_json().encode()), "application/json")
            # whoever tidies up looks for references before they delete: one of both sees the other
            if self._store.size(f"{earlier}/{MANIFEST}") is None:
                self._store.remove(f"{self._folder}/{UNCHANGED}")
                return None
        except StoreError as error:
            logger.info("The manifest is written as a whole: %s", error)
            return None
        return earlier

    def _unchanged_since(self) -> tuple[str, list[bytes]] | None:
        """Return the folder of an earlier batch with the same rows, but those that failed again, and these.

        Its page has all that this one's would have.
        """
        if self._totals.generated or not self._totals.cached:
            return None
        if self._store.size(f"{self._folder}/{MANIFEST}"):
            return None  # it is another attempt's, to be written over
        needed = {MANIFEST, page_name(1)}
        needed |= {THUMBNAILS} if len(self._thumbnails) else set()
        needed |= {PARQUET} if writes_parquet() else set()
        for folder, with_prompts in last_folders(self._store, self._name, self._api_origin).items():
            files = {listed.key.removeprefix(f"{folder}/") for listed in self._store.list(f"{folder}/")}
            if with_prompts == self._may_show.prompts and needed <= files:
                with self._store.open(self._store.uri(f"{folder}/{MANIFEST}")) as lines:
                    again = failed_again(self._rows.lines(), lines)
                if again is not None:
                    return folder, again
        return None

    def _write_all(self) -> tuple[str | None, str | None, str]:
        """Write thumbnails, pages, and both manifests; return the addresses of page, table and manifest.

        The manifest comes last, and as patiently as images, since nothing else tells why rows failed.
        """
        gallery = table = None
        with _harmless("thumbnails are"):
            if len(self._thumbnails):
                self._upload(THUMBNAILS, self._thumbnails.open, "application/zip")
        with _harmless("gallery page is"):
            gallery = self._write_gallery()
        with _harmless("Parquet manifest is"):
            if writes_parquet():
                rows = parquet_of(self._rows.lines())
                table = self._upload(PARQUET, rows.open, "application/vnd.apache.parquet")
        lines = Spool.of(self._rows.lines())
        with waiting(UPLOAD_PATIENCE):
            return gallery, table, self._upload(MANIFEST, lines.open, "application/x-ndjson")

    def _tell(self, row: Row) -> None:
        """Log a failure; of very many, the first."""
        if row.status != "failed" or self._totals.failed > TOLD:
            return
        shown = self._may_show.row(row)
        name = shown.values.get("name") or f"{shown.model} {(shown.request_hash or 'illegal')[:12]}".strip()
        reason = one_line(shown.error or "", REASON)
        self._log.warning(
            "Request %d (%s) failed: %s: %s", row.row, one_line(name, CELL), row.error_type, reason
        )

    def _write_gallery(self) -> str:
        gallery = Gallery(
            title=self._name,
            totals=self._totals,
            thumbnails=self._thumbnails,
            made=datetime.now(UTC),
            run_id=self._flow_run_id,
            run_url=_run_url(self._flow_run_id),
            folder_uri=self._store.uri(self._folder),
            store_uri=self._store.uri("x").removesuffix("/x"),
        )
        for file, pieces in gallery.pages(self._shown()):
            page = Spool.of(piece.encode() for piece in pieces)
            self._upload(file, page.open, "text/html; charset=utf-8")
        return self._store.uri(f"{self._folder}/{page_name(1)}")

    def _upload(self, file: str, body: Body, media_type: str) -> str:
        key = f"{self._folder}/{file}"
        self._store.objects.write(key, body, Facts(media_type))
        return self._store.uri(key)

    def _publish(self, report: BatchReport) -> None:
        failures = self._shown() if self._totals.failed else iter(())
        markdown = batch_markdown(
            report,
            failures=(row for row in failures if row.status == "failed"),
            # what shows nothing new is small
            pictures=() if report.same_as else self._pictures(),
            links=self._links,
        )
        self._progress.finish(report.summary)
        publish("markdown", batch_key(self._name), markdown, description=report.summary)
        if report.same_as:
            return
        manifest = self._store.public_url(report.manifest_uri) or report.manifest_uri
        table = image_table(self._shown(), manifest)
        publish("table", batch_key(self._name, "images"), table, description=f"The images of {self._name}")

    def _shown(self) -> Iterator[Row]:
        return map(self._may_show.row, self._rows.rows())

    def _pictures(self) -> Iterator[Picture]:
        for row in self._shown():
            for image in row.images:
                known = self._thumbnails.get(image.sha256)
                small = thumbnail_or_none(partial(io.BytesIO, known)) if known else None
                yield Picture(row, image, small)

    def _standing(self) -> Standing:
        in_flight = self._dispatch.in_flight if self._dispatch else None
        return Standing(self._totals, self._total, in_flight, self._sent, self._sending)

    def _price(self, row: Row) -> float | None:
        price = self._prices.get(row.request.model) if row.request and row.images else None
        return price.of(len(row.images), row.usage) if price else None


def _run_url(flow_run_id: str) -> str | None:
    """Return where Prefect's UI shows a run, unless its server is a temporary one, which is gone by then."""
    ui = get_current_settings().ui_url
    return f"{ui.rstrip('/')}/runs/flow-run/{flow_run_id}" if ui else None


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Let nothing that fails here cost the manifest too."""
    try:
        yield
    except Exception as error:
        logger.warning("The %s not written: %s: %s", what, type(error).__name__, error)
