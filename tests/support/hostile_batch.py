"""A batch of hostile prompts against a sandbox, in a process of its own; prints its report as JSON.

python -m tests.support.hostile_batch FOLDER ITS_WEB_ADDRESS
"""

from __future__ import annotations

import sys

from prefect import flow

from prefect_ttapi import BatchReport, ImageStore, TTAPICredentials, generate_batch
from prefect_ttapi.sandbox import Sandbox

NAME = "autumn <img src=x onerror=alert(1)>"
PROMPTS = [
    "a lighthouse at dusk",
    "</td></table></script><script>alert(1)</script><img src=x onerror=alert(1)>",
    "a | b `code` ```fence``` **bold** [x](javascript:alert(1))",
    "\u202e\u05de\u05d2\u05d3\u05dc\u05d5\u05e8 right to left",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family\n\n# at sea",
    ("long <b>and</b> " * 2_000)[:32_000],
]
REFUSED = "[[sandbox:moderation]] <b>refused</b>"


@flow(name="hostile")
def hostile(folder: str, base_url: str) -> BatchReport:
    """Six images and a failure, in a store that has a public address."""
    with Sandbox(tiny=True) as sandbox:
        return generate_batch(
            [{"prompt": prompt, "model": "gpt-image-2"} for prompt in [*PROMPTS, REFUSED]],
            TTAPICredentials(api_key="sandbox", base_url=sandbox.base_url),
            ImageStore(url=f"{folder}/store", public_base_url=f"{base_url}/store"),
            deliver_to=ImageStore(url=f"{folder}/shop", public_base_url=f"{base_url}/shop"),
            raise_on_failure=False,
            name=NAME,
        )


if __name__ == "__main__":
    print(hostile(*sys.argv[1:]).model_dump_json())
