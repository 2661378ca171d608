"""A small flow with one batch, run as a process of its own: what the tests kill, interrupt and cancel.

python -m tests.support.small_flow SETTINGS        one run, as a command line
python -m tests.support.small_flow SETTINGS serve  runs on demand, until stopped
"""

from __future__ import annotations

import json
import sys
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from prefect_ttapi import BatchReport, ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.cli.running import at_a_terminal


@flow(name="small", persist_result=False)
def small(store: dict[str, Any], base_url: str, requests: int, grace: float = 20.0) -> BatchReport:
    """So many ships, four at a time."""
    print(f"run {flow_run.id}", flush=True)
    return generate_batch(
        [{"prompt": f"ship {number}", "model": "gpt-image-1"} for number in range(requests)],
        TTAPICredentials(api_key="sandbox-key", base_url=base_url),
        ImageStore(**store),
        max_in_flight=4,
        name="small",
        grace=grace,
    )


def main() -> int:
    """The exit status: 0 once all images are there."""
    settings = json.loads(sys.argv[1])
    if sys.argv[2:] == ["serve"]:
        small.serve("small", parameters=settings)
        return 0
    with at_a_terminal():
        print(small(**settings).manifest_uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())
