"""A chain as a tree of lines, safe to show on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from prefect_ttapi.cli.chain import Copy, Entry, Made, Origin, SourceRow
from prefect_ttapi.cli.reporting import size
from prefect_ttapi.ledger.documents import Payment
from prefect_ttapi.lineage.markdown import one_line
from prefect_ttapi.responses import Generation, StoredImage

#: Characters of a line, and rows of a run that are shown; --json has all.
_LINE: Final = 400
ROWS: Final = 50


@dataclass(frozen=True)
class Node:
    """A line, and those below it."""

    text: str
    below: Sequence[Node] = ()


def lines(node: Node) -> Iterator[str]:
    """The tree's lines.

    >>> print("\\n".join(lines(Node("image", [Node("request", [Node("prompt")]), Node("row")]))))
    image
    ├─ request
    │  └─ prompt
    └─ row
    """
    yield one_line(node.text, _LINE)
    for position, child in enumerate(node.below, start=1):
        last = position == len(node.below)
        first, *rest = lines(child)
        yield ("└─ " if last else "├─ ") + first
        yield from (("   " if last else "│  ") + line for line in rest)


def origin_tree(origin: Origin) -> Node:
    """Who made it, from the object down to the row."""
    parts = [
        *([_copy(origin.delivered)] if origin.delivered else []),
        *([_image(origin.image, origin.image_is_there)] if origin.image else []),
        *([Node(f"request {origin.request_hash}")] if not origin.entries and origin.request_hash else []),
        *(_entry(entry, with_images=origin.image is None) for entry in origin.entries),
        *map(_row, origin.rows),
        *(Node(f"not found: {gap}") for gap in origin.gaps),
    ]
    return Node(origin.address, parts)


def made_tree(made: Made) -> Node:
    """What a run made; the first rows of it."""
    shown: list[Node] = []
    more = 0
    for source in made.rows:
        if len(shown) < ROWS:
            shown.append(_row(source, with_request=True))
        else:
            more += 1
    rest = [Node(f"and {more:,} more rows; --json has all")] if more else []
    return Node(
        f"flow run {made.run_id}", [*(Node(f"manifest {uri}") for uri in made.manifests), *shown, *rest]
    )


def _copy(copy: Copy) -> Node:
    return Node(
        f"delivered copy, {size(copy.size_bytes)}; it says of itself",
        [Node(f"{name}: {value}") for name, value in sorted(copy.metadata.items())] or [Node("nothing")],
    )


def _image(image: StoredImage, is_there: bool | None) -> Node:
    facts = [
        Node(
            f"{image.width} x {image.height}, {image.media_type}, {size(image.size_bytes)}, image {image.index}"
        ),
        Node(f"SHA-256 {image.sha256}"),
        *([Node(f"revised prompt: {image.revised_prompt}")] if image.revised_prompt else []),
    ]
    return Node(
        f"stored image {image.uri}" + ("" if is_there is not False else " (gone, or cut short)"), facts
    )


def _entry(entry: Entry, *, with_images: bool) -> Node:
    made = entry.generation
    below = [
        *(_made(made) if made else []),
        *([_image(image, None) for image in made.images] if made and with_images else []),
        *(_payment("perhaps paid for, too", note) for note in entry.maybe_paid),
        *(_payment("also paid for", note) for note in entry.also_paid),
    ]
    return Node(f"ledger record {entry.uri}: {entry.state}", below)


def _made(made: Generation) -> Iterator[Node]:
    asked = made.request.model_dump(mode="json", exclude_defaults=True, exclude={"prompt", "model"})
    parameters = [Node(f"{name}: {value}") for name, value in asked.items()]
    prompt = Node(f"prompt: {made.request.prompt}")
    yield Node(f"request {made.request_hash}", [prompt, Node(f"model: {made.request.model}"), *parameters])
    calls = f"{made.api_calls} API call" + ("s" if made.api_calls > 1 else "")
    call = f", API request id {made.request_id}" if made.request_id else ""
    when = f"{made.created_at:%Y-%m-%d %H:%M:%S} UTC"
    usage = made.usage
    tokens = usage and (
        f"{usage.total_tokens:,} tokens: {usage.input_tokens:,} in, {usage.output_tokens:,} out"
    )
    yield Node(
        f"answered by {made.api_origin}, {when}: {calls}, {made.seconds:.1f} s{call}",
        [Node(tokens)] if tokens else [],
    )
    runs = (("flow run", made.flow_run_id), ("task run", made.task_run_id))
    paid = [f"{name} {run}" for name, run in runs if run] or ["no Prefect run"]
    version = f", with prefect-ttapi {made.package_version}" if made.package_version else ""
    yield Node(f"paid for by {', '.join(paid)}{version}")


def _payment(what: str, note: Payment) -> Node:
    return Node(f"{what}: run {note.run_id}, {note.when:%Y-%m-%d %H:%M:%S} UTC: {note.what}")


def _row(source: SourceRow, *, with_request: bool = False) -> Node:
    row = source.row
    values = ", ".join(f"{name}={value}" for name, value in row.values.items())
    asked = [Node(f"request {row.request_hash}"), Node(f"prompt: {row.prompt}")] if with_request else []
    below = [
        *asked,
        *([Node(f"image {image.uri}") for image in row.images] if with_request else []),
        *([Node(f"values: {values}")] if values else []),
        *([Node(f"{row.error_type}: {row.error}")] if row.error else []),
        *(
            Node(f"delivered {copy.uri}" + (f" ({copy.rendition})" if copy.rendition else ""))
            for copy in row.delivered
        ),
    ]
    where = "" if with_request else f" of {source.manifest_uri}"
    return Node(f"row {row.row}{where}: {row.status}", below)
