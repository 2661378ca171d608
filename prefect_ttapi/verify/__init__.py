"""Reading a whole store and telling what is wrong with it: `verify`, and `repair` for what can surely be put right.

`python -m prefect_ttapi verify STORE` is a thin shell around these.
"""

from prefect_ttapi.progress import Step
from prefect_ttapi.verify.checks import verify
from prefect_ttapi.verify.findings import Finding, Kind
from prefect_ttapi.verify.repair import Repair, repair

__all__ = ["Finding", "Kind", "Repair", "Step", "repair", "verify"]
