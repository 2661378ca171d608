"""The command `init`: a folder with prompts, a flow that works on them, and its deployment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from prefect_ttapi.cli.reporting import say

_PROMPTS: Final = """\
name,prompt,model,size
lighthouse,a lighthouse at dawn,gpt-image-2,1536x1024
fox,a fox made of folded paper,gpt-image-2,1024x1024
harbour,a harbour in the fog,gpt-image-1,1024x1024
"""

_FLOW: Final = '''\
"""The images of prompts.csv that are not there yet: each of them is paid for once."""

from prefect import flow

from prefect_ttapi import Budget, ImageStore, TTAPICredentials, generate_batch, read_prompts


@flow(persist_result=False)
def nightly(prompts: str, store: str, deliver: str, key: str = "{name}.{ext}", max_images: int = 100) -> str:
    """Generate and deliver what is missing.

    Args:
        prompts: The file of prompts. Columns that are no field of a request can be used in the key.
        store: Where images and the ledger are kept: a folder or s3://bucket/prefix.
        deliver: Where copies go: a folder or s3://bucket/prefix.
        key: The template of their names.
        max_images: How many images a run pays for at most. The next run goes on from there.
    """
    given = read_prompts(prompts, key=key)
    report = generate_batch(
        given.requests,
        TTAPICredentials.from_env(),  # TTAPI_API_KEY
        ImageStore(url=store),
        deliver_to=ImageStore(url=deliver),
        key=key,
        values=given.values,
        budget=Budget(images=max_images),
        name="nightly",
    )
    return report.summary


if __name__ == "__main__":
    print(nightly("prompts.csv", "./images", "./website"))
'''

_DEPLOYMENT: Final = """\
# A run of flow.py every night. From this folder, each of the first two in a terminal of its own, which keeps running:
#   prefect server start
#   prefect worker start --pool images --type process
#   prefect --no-prompt deploy --all
# All of them need PREFECT_API_URL=http://127.0.0.1:4200/api, and the worker TTAPI_API_KEY.
name: images

pull:
  - prefect.deployments.steps.set_working_directory:
      directory: {folder}

deployments:
  - name: nightly
    entrypoint: flow.py:nightly
    description: Every night, the images of prompts.csv that are not there yet.
    parameters:
      prompts: prompts.csv
      store: ./images
      deliver: ./website
    schedules:
      - cron: "0 3 * * *"
        timezone: UTC
    # one run at a time: a second one would only wait for the first one's images
    concurrency_limit:
      limit: 1
      collision_strategy: CANCEL_NEW
    work_pool:
      name: images
"""

_NEXT: Final = """\
Next, in {folder}:
  prefect-ttapi run prompts.csv --store ./images --deliver ./website --key "{{name}}.{{ext}}" --sandbox
  prefect-ttapi open ./images
prefect.yaml says how to run it every night."""


def run(address: str) -> None:
    """Write the files, none of which may be there yet.

    Raises:
        ValueError: one of them is there.
    """
    folder = Path(address).expanduser().absolute()
    files = {
        "prompts.csv": _PROMPTS,
        "flow.py": _FLOW,
        "prefect.yaml": _DEPLOYMENT.format(folder=json.dumps(str(folder))),
    }
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise ValueError(
            f"{folder} has {' and '.join(there)} already: nothing was written; name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    say(f"Written: {', '.join(files)}.", _NEXT.format(folder=folder))
