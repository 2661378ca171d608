"""Send many requests in one call, and report on each of them."""

from prefect_ttapi.batch.generate import (
    Estimate,
    agenerate_batch,
    check_batch,
    estimate_batch,
    generate_batch,
)
from prefect_ttapi.batch.prompts import Prompts, read_prompts
from prefect_ttapi.generation.budget import Budget, Price
from prefect_ttapi.lineage.report import BatchReport

__all__ = [
    "BatchReport",
    "Budget",
    "Estimate",
    "Price",
    "Prompts",
    "agenerate_batch",
    "check_batch",
    "estimate_batch",
    "generate_batch",
    "read_prompts",
]
