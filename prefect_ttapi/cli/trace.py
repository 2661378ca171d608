"""The subcommand `trace`: who made this, and what did this make?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from prefect_ttapi.cli.ancestry import trace_object, trace_request, trace_run
from prefect_ttapi.cli.chain import Made, Origin
from prefect_ttapi.cli.reporting import Progress
from prefect_ttapi.cli.stores import store_at
from prefect_ttapi.cli.tree import lines, made_tree, origin_tree
from prefect_ttapi.storage.layout import BATCHES, is_sha256, object_uri, run_in, split_at
from prefect_ttapi.storage.store import ImageStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `trace`."""
    parser.epilog = "Exit status: 0 found; 1 a part of the chain is lost, or all of it; 2 bad arguments."
    add = parser.add_argument
    add("address", metavar="ADDRESS", nargs="?",
        help="an image or a delivered copy (s3://bucket/key, a path), a manifest, or a request's hash")  # fmt: skip
    add("--run", dest="run_id", metavar="ID", help="a flow run, in place of an address: what it made")
    add("--store", metavar="STORE", help="where the ledger is: a folder, s3://bucket/prefix, or block:NAME")
    add("--endpoint-url", metavar="URL", help="of an S3 service other than AWS")
    add("--everywhere", action="store_true", help="look through all manifests, not only the paying run's")
    add("--json", action="store_true", help="all of it, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Trace, and print the chain; return the exit status."""
    progress = Progress(sys.stderr)
    store = store_at(arguments.store, arguments.endpoint_url) if arguments.store else None
    try:
        found = _trace(arguments, store, progress)
        text = _as_json(found) if arguments.json else _as_tree(found)
        for piece in text:
            progress.clear()
            print(_encodable(piece))
    finally:
        progress.clear()
    return 1 if isinstance(found, Origin) and found.gaps else 0


def _trace(arguments: argparse.Namespace, store: ImageStore | None, progress: Progress) -> Origin | Made:
    address, run_id = arguments.address, arguments.run_id
    if (address is None) == (run_id is None):
        raise ValueError("say either what to trace, or --run and a flow run's id")
    if run_id is not None:
        return trace_run(run_id, _needed(store, "--run"), progress=progress)
    if is_sha256(address):
        where = _needed(store, "a request's hash")
        return trace_request(address, where, everywhere=arguments.everywhere, progress=progress)
    root, folder = split_at(object_uri(address), BATCHES) or ("", "")
    if run := run_in(folder):
        return trace_run(run, store or store_at(root, arguments.endpoint_url), progress=progress)
    return trace_object(
        address,
        store,
        endpoint_url=arguments.endpoint_url,
        everywhere=arguments.everywhere,
        progress=progress,
    )


def _needed(store: ImageStore | None, by: str) -> ImageStore:
    if store is None:
        raise ValueError(f"{by} needs --store: where the ledger is")
    return store


def _as_tree(found: Origin | Made) -> Iterator[str]:
    return lines(origin_tree(found) if isinstance(found, Origin) else made_tree(found))


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


def _encodable(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
