"""Talking to the API; usable without Prefect."""
