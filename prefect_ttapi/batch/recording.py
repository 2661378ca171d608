"""What a batch leaves behind: the manifest, the gallery page, and artifacts on the run."""

from __future__ import annotations

import array
import io
import logging
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Final, Self

from prefect_ttapi.batch.items import Done
from prefect_ttapi.batch.report import BatchReport
from prefect_ttapi.lineage.artifacts import Progress, batch_key, publish_markdown, publish_table
from prefect_ttapi.lineage.gallery import pages
from prefect_ttapi.lineage.manifest import Row, read_manifest, write_manifest
from prefect_ttapi.lineage.markdown import PICTURES, batch_markdown, image_table
from prefect_ttapi.lineage.pictures import pictures
from prefect_ttapi.lineage.thumbnails import thumbnail_or_none
from prefect_ttapi.lineage.totals import Totals
from prefect_ttapi.responses import StoredImage
from prefect_ttapi.spool import Spool
from prefect_ttapi.storage.objects import Facts
from prefect_ttapi.storage.settings import UPLOAD_PATIENCE
from prefect_ttapi.storage.store import ImageStore

logger = logging.getLogger(__name__)

#: Rows whose images are shown on the gallery page; the others are in the manifest.
GALLERY_ROWS: Final = 500


#: How many batches each attempt at a flow run has begun in this process.
_BEGUN: Counter[tuple[str, int]] = Counter()
_BEGUN_LOCK = threading.Lock()


def folder_of_batch(flow_run_id: str, attempt: int) -> str:
    """Where the next batch of a flow run keeps its manifest: `batches/<run>`, the second `batches/<run>/2`, and so on.

    Another attempt at the run begins from the first again, and writes over what the attempt before left.
    """
    with _BEGUN_LOCK:
        _BEGUN[flow_run_id, attempt] += 1
        number = _BEGUN[flow_run_id, attempt]
    return f"batches/{flow_run_id}" + (f"/{number}" if number > 1 else "")


class RowFile:
    """Rows as they come, kept in a temporary file and read in order: 8 bytes of memory a row."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="ttapi-rows-")  # noqa: SIM115 - `close` closes it
        self._starts = array.array("q")

    def add(self, row: Row) -> None:
        """Keep a row; rows come in any order."""
        missing = row.row + 1 - len(self._starts)
        self._starts.extend([-1] * max(0, missing))
        self._starts[row.row] = self._file.seek(0, io.SEEK_END)
        self._file.writelines(write_manifest([row]))

    def lines(self) -> Iterator[bytes]:
        """The rows' lines in order; a row that never came is left out."""
        for start in self._starts:
            if start >= 0:
                self._file.seek(start)
                yield self._file.readline()

    def rows(self) -> Iterator[Row]:
        """The rows in order."""
        return read_manifest(self.lines())

    def close(self) -> None:
        """Forget them."""
        self._file.close()


class Recorder:
    """Keeps a batch's rows, shows its progress on the run, and writes down at the end what became of it.

    Args:
        store: where manifest and gallery page go.
        name: the batch's name.
        flow_run_id: the run it belongs to.
        folder: of manifest and page, in `store`.
        total: how many rows there will be, where that is known.
    """

    def __init__(
        self, store: ImageStore, name: str, flow_run_id: str, folder: str, total: int | None
    ) -> None:
        self._store = store
        self._name = name
        self._flow_run_id = flow_run_id
        self._folder = folder
        self._total = total
        self._started = time.monotonic()
        self._totals = Totals()
        self._rows = RowFile()
        self._thumbnails: dict[str, bytes] = {}
        self._progress = Progress(batch_key(name, "progress"), f"{name}: images")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()

    def add(self, done: Done) -> None:
        """One more row."""
        self._rows.add(done.row)
        self._totals = self._totals.add(done.row)
        for image, thumbnail in zip(done.row.images, done.thumbnails, strict=False):
            if thumbnail is not None:
                self._thumbnails[image.sha256] = thumbnail
        self._progress.update(self._totals.rows, self._total, self._described())

    def finish(self) -> BatchReport:
        """Write page and manifest, publish the artifacts, and report."""
        try:
            self._write_gallery()
        except Exception as error:  # it shows what the manifest says, which must not be lost with it
            logger.warning("The gallery page was not written: %s: %s", type(error).__name__, error)
        manifest = self._write_manifest()
        report = BatchReport(
            name=self._name,
            flow_run_id=self._flow_run_id,
            totals=self._totals,
            manifest_uri=manifest,
            gallery_uri=self._store.uri(f"{self._folder}/index.html"),
            seconds=round(time.monotonic() - self._started, 3),
        ).with_store(self._store)
        self._publish(report)
        return report

    def _write_gallery(self) -> None:
        gallery = pages(
            self._rows.rows(),
            self._thumbnail,
            self._totals,
            title=self._name,
            folder_uri=self._store.uri(self._folder),
            store_uri=self._store.uri("images").removesuffix("/images"),
            manifest="manifest.jsonl",
        )
        for file, page in gallery:
            self._store.write(f"{self._folder}/{file}", page.encode(), "text/html; charset=utf-8")

    def _write_manifest(self) -> str:
        """Its address. It comes last, and as patiently as the images, since nothing else tells why rows failed."""
        spool = Spool()
        for line in self._rows.lines():
            spool.write(line)
        key = f"{self._folder}/manifest.jsonl"
        self._store.objects.write(key, spool.open, Facts("application/x-ndjson"), patience=UPLOAD_PATIENCE)
        return self._store.uri(key)

    def _publish(self, report: BatchReport) -> None:
        markdown = batch_markdown(
            self._name,
            self._totals,
            failures=(row for row in self._rows.rows() if row.status == "failed"),
            pictures=pictures(self._shown_first(), self._small_thumbnail),
            manifest_uri=report.manifest_uri,
            gallery_uri=report.gallery_uri,
        )
        self._progress.finish(self._described())
        publish_markdown(batch_key(self._name), markdown, description=report.summary)
        table = image_table(self._rows.rows(), report.manifest_uri)
        publish_table(batch_key(self._name, "images"), table, description=f"The images of {self._name}")

    def _shown_first(self) -> Iterator[Row]:
        return islice((row for row in self._rows.rows() if row.images), PICTURES)

    def _thumbnail(self, image: StoredImage) -> bytes | None:
        return self._thumbnails.get(image.sha256)

    def _small_thumbnail(self, image: StoredImage) -> bytes | None:
        known = self._thumbnails.get(image.sha256)
        return thumbnail_or_none(partial(io.BytesIO, known)) if known else None

    def _described(self) -> str:
        totals = self._totals
        of = f" of {self._total:,}" if self._total is not None else ""
        return (
            f"{totals.rows:,}{of} requests: {totals.generated:,} generated, {totals.cached:,} cached, "
            f"{totals.failed:,} failed, {totals.skipped:,} skipped"
        )
