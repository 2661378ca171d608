"""The deployments of prefect.yaml without a work pool: one process serves them, and runs what is scheduled.

prefect-ttapi bootstrap --store s3://acme-images/campaigns
python deployments/serve.py
"""

import os
from pathlib import Path
from typing import Any

from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from prefect_ttapi.cli.flows import images, retry, review
from prefect_ttapi.cli.run import campaign

PROMPTS = Path(__file__).resolve().parent.parent / "flows/prompts.csv"
#: The blocks that `prefect-ttapi bootstrap` makes.
BLOCKS = {"store": "block:images", "credentials": "images"}
#: One run of a deployment at a time: a second one would only wait for the first one's images.
ALONE = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
#: The flows are found in the package, and not in this file.
COMMON: dict[str, Any] = {"tags": ["images"], "entrypoint_type": EntrypointType.MODULE_PATH}


def deployments() -> list[RunnerDeployment]:
    """Return the four deployments that one process serves."""
    return [
        campaign.to_deployment(
            "nightly",
            description="Every night, the images of the campaign's prompts that are not there yet.",
            parameters={"prompts": str(PROMPTS), "name": "nightly"} | BLOCKS,
            schedule=Cron("0 3 * * *", timezone="Europe/Berlin"),
            concurrency_limit=ALONE,
            **COMMON,
        ),
        retry.to_deployment(
            "hourly",
            description="Every hour, what failed in the newest nightly batch, unless it would fail again or may have "
            "been paid for.",
            parameters={"name": "nightly"} | BLOCKS,
            schedule=Cron("30 * * * *", timezone="Europe/Berlin"),
            concurrency_limit=ALONE,
            **COMMON,
        ),
        images.to_deployment(
            "on-demand",
            description="The images of a few prompts that somebody fills into the form of a run.",
            parameters=BLOCKS,
            **COMMON,
        ),
        review.to_deployment(
            "after-batch",
            description="Started by the end of any batch that lacks images; its run says which, and why.",
            parameters={"store": BLOCKS["store"]},
            triggers=[
                DeploymentEventTrigger(
                    expect={"ttapi.batch.completed"},
                    match={"ttapi.ok": "false"},
                    parameters={"manifest": "{{ event.resource.id }}"},
                )
            ],
            **COMMON,
        ),
    ]


if __name__ == "__main__":
    # runs that are dead are found by what they no longer send
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    serve(*deployments())
