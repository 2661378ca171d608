"""A stand-in for the API that draws placeholder pictures: for tests, demos and benchmarks.

Nothing falls back to it: it is asked for, by `python -m prefect_ttapi sandbox` or by

>>> with Sandbox(seed=7) as sandbox:
...     sandbox.base_url.endswith("/sandbox"), sandbox.calls
(True, 0)

Prompts in Latin, Greek and Cyrillic letters are always legible; other scripts are where the system has a font for them
(DejaVu, Noto, Unifont), and are code points in boxes elsewhere.
"""

from prefect_ttapi.sandbox.server import Sandbox

__all__ = ["Sandbox"]
