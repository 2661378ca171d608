"""Example flows, to be read and copied into a project: they import public names only."""

from pathlib import Path


def checkout() -> dict[str, str]:
    """Return the folder that holds `flows`, as a step of `prefect deploy` does: runs take relative paths from there."""
    return {"directory": str(Path(__file__).resolve().parent.parent)}
