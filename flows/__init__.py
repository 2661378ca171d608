"""Example flows, thin and meant to be read; each runs as `python -m flows.NAME`, with `--help`."""
