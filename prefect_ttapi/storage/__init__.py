"""Stores of images, and of the ledger beside them; usable without Prefect runs."""
