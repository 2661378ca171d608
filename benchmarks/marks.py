"""What marks and signatures cost per image, beside the rendition that is made of it.

    python benchmarks/marks.py

A noisy picture of 1024 x 1024 in each format, and a PNG of 128 MiB that is not decoded. The best of several rounds
counts; memory is the most that Python held above what it held before. Signatures are by a P-256 key, with and without
credentials in the image.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from PIL import Image

# pictures are put together as those of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

from prefect_ttapi.images.labels import mark, read_labels
from prefect_ttapi.images.renditions import Rendition, render
from prefect_ttapi.images.signing import Change, Signer, read_signature
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.images.xmp import Statement
from prefect_ttapi.sandbox.pictures import certificates_for_testing
from tests.support.pictures import png_of, saved

ROUNDS = 7
SAID = Statement("gpt-image-2", request_hash="ab" * 32, source_sha256="cd" * 32)
LARGE = 128 * 1024 * 1024


def picture(form: str) -> Spool:
    """A picture with enough noise to be as long as one of a model's: a PNG of it has 1.5 MB."""
    noise = Image.effect_noise((1024, 1024), 12).convert("RGB")
    return Spool.of([saved(noise, form)])


def large() -> Spool:
    """A PNG whose one chunk of pixels nobody unpacks."""
    return Spool.of([png_of(1024, 1024, bytes(LARGE))])


def best(work: Callable[[], object]) -> float:
    """Return the milliseconds of the fastest round."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times) * 1_000


def memory(work: Callable[[], object]) -> float:
    """Return megabytes."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def line(form: str) -> str:
    """Return what one format costs."""
    original = picture(form)
    rendition = Rendition(format=form.lower(), max_size=512, mark=False)
    (rendered,) = render(original.open, [rendition])
    look = best(lambda: read_labels(original.open()))
    copy = best(lambda: Spool.of(mark(original.open(), SAID)))
    made = best(lambda: render(original.open, [rendition]))
    its = best(lambda: Spool.of(mark(rendered.spool.open(), SAID)))
    added = Spool.of(mark(rendered.spool.open(), SAID)).size_bytes - rendered.spool.size_bytes
    size = original.size_bytes / 1e6
    return f"{form:<16}{size:>7.2f} MB{look:>7.2f} ms{copy:>7.2f} ms{made:>9.2f} ms{its:>7.2f} ms{added:>7} B"


def signed_line(form: str, signer: Signer) -> str:
    """Return what it costs to sign one format, and what is made of a signed image."""
    original, kind = picture(form), f"image/{form.lower()}"
    (rendered,) = render(original.open, [Rendition(format=form.lower(), max_size=512, mark=False)])
    change = Change("512", ("c2pa.resized",))
    by_maker = signer.sign(original.open, kind, SAID)
    costs = ""
    for file, source in (
        (original, (original.open, kind)),
        (rendered.spool, (original.open, kind)),
        (rendered.spool, (by_maker.open, kind)),
    ):
        took = best(lambda file=file, source=source: signer.sign(file.open, kind, SAID, source, change))
        added = signer.sign(file.open, kind, SAID, source, change).size_bytes - file.size_bytes
        costs += f"{took:>12.2f} ms{added:>7} B"
    return f"{form:<8}{costs}{best(lambda: read_signature(by_maker.open(), kind)):>9.2f} ms"


def main() -> None:
    print(f"{'file':<16}{'size':>10}{'look':>10}{'mark':>10}{'rendition':>12}{'its mark':>10}{'added':>9}")
    for form in ("PNG", "JPEG", "WEBP"):
        print(line(form))
    spool = large()
    look = best(lambda: read_labels(spool.open()))
    copy = best(lambda: Spool.of(mark(spool.open(), SAID)))
    held = memory(lambda: Spool.of(mark(spool.open(), SAID)))
    size = spool.size_bytes / 1e6
    print(f"{'PNG of 128 MiB':<16}{size:>7.2f} MB{look:>7.2f} ms{copy:>7.2f} ms, {held:.1f} MB of memory")
    signer = Signer.of(*certificates_for_testing("benchmark"))
    print(f"\n{'':<8}{'sign a copy':>24}{'a rendition':>24}{'of a signed image':>24}{'read':>12}")
    for form in ("PNG", "JPEG", "WEBP"):
        print(signed_line(form, signer))


if __name__ == "__main__":
    main()
