"""Prompts x models, as one gallery: which model suits? The key is in TTAPI_API_KEY.

python -m flows.compare_models "a lighthouse at dawn" "a fox made of paper"
"""

import sys
from collections.abc import Sequence

from prefect import flow

from prefect_ttapi import BatchReport, ImageStore, TTAPICredentials, generate_batch


@flow(name="compare-models", persist_result=False)
def compare_models(
    prompts: Sequence[str],
    store: str = "./images",
    models: Sequence[str] = ("gpt-image-2", "gpt-image-1", "dall-e-3", "dall-e-2"),
    size: str = "1024x1024",
) -> BatchReport:
    """Ask each model for each prompt; the gallery shows them side by side, and the report tells who was how fast."""
    requests = [{"prompt": prompt, "model": model, "size": size} for prompt in prompts for model in models]
    return generate_batch(
        requests,
        TTAPICredentials.from_env(),
        ImageStore(url=store),
        name="compare-models",
        raise_on_failure=False,
    )


if __name__ == "__main__":
    report = compare_models(sys.argv[1:])
    print(report.summary, report.latency, report.gallery_uri, sep="\n")
