"""The command `trace`: who made this, and what did this make? Words, then a chain as a tree of lines; or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Final, NamedTuple

from rich.filesize import decimal

from prefect_ttapi.capabilities import Model
from prefect_ttapi.cli.arguments import Tracing
from prefect_ttapi.cli.chain import Entry, Made, Origin, Search, SourceRow, trace_object
from prefect_ttapi.cli.reporting import Progress, complain, utc
from prefect_ttapi.cli.stores import prices_of, store_at
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.budget import Price
from prefect_ttapi.images.signing import EXTRA
from prefect_ttapi.ledger.documents import Payment
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.shown import counted, one_line
from prefect_ttapi.results import Generation, StoredImage
from prefect_ttapi.storage.layout import BATCHES, is_sha256, object_uri, run_in, split_at
from prefect_ttapi.storage.store import ImageStore


def run(address: str | None, asked: Tracing) -> int:
    """Trace, and print the chain; return the exit status."""
    prices, progress = prices_of(asked.price), Progress(sys.stderr)
    try:
        found = _trace(address, asked, progress)
        for piece in _as_json(found) if asked.json else _told_to_people(found, prices):
            progress.clear()
            print(piece)
    except StoreError as error:
        complain(error)
        return 1
    finally:
        progress.clear()
    return 1 if isinstance(found, Origin) and found.gaps else 0


def _trace(address: str | None, asked: Tracing, progress: Progress) -> Origin | Made:
    endpoint_url, everywhere = asked.endpoint_url, asked.everywhere
    store = store_at(asked.store, endpoint_url) if asked.store else None
    if asked.run is not None and address is None:
        return Search(_needed(store, "--run"), progress).run(asked.run)
    if address is None or asked.run is not None:
        raise ValueError("say either what to trace, or --run and a flow run's id")
    if is_sha256(address):
        return Search(_needed(store, "a request's hash"), progress, everywhere=everywhere).request(address)
    root, folder = split_at(object_uri(address), BATCHES) or ("", "")
    if run_id := run_in(folder):
        return Search(store or store_at(root, endpoint_url), progress).run(run_id)
    return trace_object(address, store, endpoint_url=endpoint_url, everywhere=everywhere, progress=progress)


def _needed(store: ImageStore | None, by: str) -> ImageStore:
    if store is None:
        raise ValueError(f"{by} needs --store: where the ledger is")
    return store


def _told_to_people(found: Origin | Made, prices: Mapping[Model, Price]) -> Iterator[str]:
    if isinstance(found, Made):
        yield from lines(_made_by_run(found))
        return
    if made := next((entry.generation for entry in found.entries if entry.generation), None):
        yield from _in_short(made, prices)
        yield ""
    yield from lines(Node(found.address, _links(found)))


def _in_short(made: Generation, prices: Mapping[Model, Price]) -> Iterator[str]:
    """Yield what most people ask: the prompt, who drew it when, what it cost, and the run that paid."""
    price = prices.get(made.request.model)
    cost = [counted(len(made.images), "image"), counted(made.api_calls, "API call")]
    cost += [counted(made.usage.total_tokens, "token")] if made.usage else []
    cost += [f"{price.of(len(made.images), made.usage):,.4f} USD"] if price else []
    told = {
        "Prompt": made.request.prompt,
        "Model": made.request.model,
        "Date": utc(made.created_at),
        "Cost": ", ".join(cost),
        "Run": made.flow_run_id or "no Prefect run",
    }
    yield from (f"{name:<8}{one_line(text, _LINE)}" for name, text in told.items())


def _as_json(found: Origin | Made) -> Iterator[str]:
    """One JSON document, in pieces: a run may have more rows than fit in memory."""
    if isinstance(found, Origin):
        yield json.dumps(found.model_dump(mode="json", exclude_none=True), indent=2)
        return
    yield f'{{"run_id": {json.dumps(found.run_id)}, "manifests": {json.dumps(found.manifests)}, "rows": ['
    comma = " "
    for source in found.rows:
        yield comma + json.dumps(source.model_dump(mode="json", exclude_none=True))
        comma = ","
    yield "]}"


#: Characters of a line, and rows of a run that are shown; --json has all.
_LINE: Final = 400
ROWS: Final = 50


class Node(NamedTuple):
    """A line, and what stands below it: nodes, or texts of nodes without anything below."""

    text: str
    below: Iterable[Node | str] = ()


def lines(node: Node | str) -> Iterator[str]:
    r"""Return the tree's lines.

    >>> print("\n".join(lines(Node("image", [Node("request", ["prompt"]), "row"]))))
    image
    ├─ request
    │  └─ prompt
    └─ row
    """
    text, below = (node, []) if isinstance(node, str) else (node.text, [*node.below])
    yield one_line(text, _LINE)
    for position, child in enumerate(below, start=1):
        first, others = ("└─ ", "   ") if position == len(below) else ("├─ ", "│  ")
        for number, line in enumerate(lines(child)):
            yield (others if number else first) + line


def _made_by_run(made: Made) -> Node:
    """Return the tree of a run's images: its first rows."""
    rows = iter(made.rows)
    shown = [_row(source, with_request=True) for source in islice(rows, ROWS)]
    more = sum(1 for _ in rows)
    rest = [f"and {more:,} more rows; --json has all"] if more else []
    return Node(f"flow run {made.run_id}", [*(f"manifest {uri}" for uri in made.manifests), *shown, *rest])


def _links(origin: Origin) -> Iterator[Node | str]:
    """Yield the links of the chain from an object down to the row that asked for it."""
    if origin.found_by:
        yield f"found by {origin.found_by}"
    if origin.signature:
        yield f"Content Credentials: {origin.signature}"
    if origin.is_unread:
        yield f"Content Credentials: who signed them can be read with {EXTRA}"
    if copy := origin.delivered:
        said = [f"{name}: {value}" for name, value in sorted(copy.metadata.items())]
        yield Node(f"delivered copy, {decimal(copy.size_bytes)}; it says of itself", said or ["nothing"])
    if origin.image:
        yield _image(origin.image, " (gone, or cut short)" if origin.image_is_there is False else "")
    if origin.request_hash and not origin.entries:
        yield f"request {origin.request_hash}"
    for entry in origin.entries:
        yield Node(f"ledger record {entry.uri}: {entry.state}", _entry(entry, origin.image is None))
    yield from map(_row, origin.rows)
    yield from (f"not found: {gap}" for gap in origin.gaps)


def _image(image: StoredImage, state: str = "") -> Node:
    sides, length = f"{image.width} x {image.height}", decimal(image.size_bytes)
    facts = [f"{sides}, {image.media_type}, {length}, image {image.index}", f"SHA-256 {image.sha256}"]
    revised = [f"revised prompt: {image.revised_prompt}"] if image.revised_prompt else []
    marks = [f"marks: {', '.join(image.marks) or 'none'}"] if image.marks is not None else []
    return Node(f"stored image {image.uri}{state}", facts + marks + revised)


def _entry(entry: Entry, with_images: bool) -> Iterator[Node | str]:
    if made := entry.generation:
        yield from _made(made)
        yield from map(_image, made.images if with_images else ())
    yield from (f"perhaps paid for, too: {_payment(note)}" for note in entry.maybe_paid)
    yield from (f"also paid for: {_payment(note)}" for note in entry.also_paid)
    for answer in entry.kept:
        came = f"{decimal(answer.size_bytes)}, run {answer.run_id}, {utc(answer.when)}"
        yield Node(f"answer kept {answer.uri}", [came, answer.why, "the next run reads it again"])


def _made(made: Generation) -> Iterator[Node | str]:
    asked = made.request.model_dump(mode="json", exclude_defaults=True, exclude={"prompt", "model"})
    always = {"prompt": made.request.prompt, "model": made.request.model}
    told = [f"{name}: {value}" for name, value in (always | asked).items()]
    yield Node(f"request {made.request_hash}", told)
    facts = [counted(made.api_calls, "API call"), f"{made.seconds:.1f} s"]
    facts += [f"API request id {made.request_id}"] if made.request_id else []
    tokens = []
    if usage := made.usage:
        tokens = [f"{usage.total_tokens:,} tokens: {usage.input_tokens:,} in, {usage.output_tokens:,} out"]
    yield Node(f"answered by {made.api_origin}, {utc(made.created_at)}: {', '.join(facts)}", tokens)
    runs = {"flow run": made.flow_run_id, "task run": made.task_run_id}
    paid = ", ".join(f"{name} {run}" for name, run in runs.items() if run) or "no Prefect run"
    version = f", with prefect-ttapi {made.package_version}" if made.package_version else ""
    yield f"paid for by {paid}{version}"


def _payment(note: Payment) -> str:
    return f"run {note.run_id}, {utc(note.when)}: {note.what}"


def _row(source: SourceRow, *, with_request: bool = False) -> Node:
    where = "" if with_request else f" of {source.manifest_uri}"
    return Node(f"row {source.row.row}{where}: {source.row.status}", _told(source.row, with_request))


def _told(row: Row, with_request: bool) -> Iterator[str]:
    if with_request:
        yield f"request {row.request_hash}"
        yield f"prompt: {row.prompt}"
        yield from (f"image {image.uri}" for image in row.images)
    if row.values:
        values = (f"{name}={'null' if value is None else value}" for name, value in row.values.items())
        yield f"values: {', '.join(values)}"
    if row.error:
        yield f"{row.error_type}: {row.error}"
    for copy in row.delivered:
        yield f"delivered {copy.uri}" + (f" ({copy.rendition})" if copy.rendition else "")
