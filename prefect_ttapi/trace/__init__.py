"""The chain from an image to whoever made it, and from a run or request to what it made.

`python -m prefect_ttapi trace ADDRESS` is a thin shell around these.
"""

from prefect_ttapi.trace.chain import Copy, Entry, Made, Origin, SourceRow
from prefect_ttapi.trace.downwards import trace_run
from prefect_ttapi.trace.upwards import trace_object, trace_request

__all__ = ["Copy", "Entry", "Made", "Origin", "SourceRow", "trace_object", "trace_request", "trace_run"]
