"""Prompts files: requests for a batch, and what else each row says, from CSV, TSV or JSON Lines."""

from prefect_ttapi.prompts.reading import Prompts, PromptsError, read_prompts

__all__ = ["Prompts", "PromptsError", "read_prompts"]
