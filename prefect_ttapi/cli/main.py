"""The program: `prefect-ttapi COMMAND`, or `python -m prefect_ttapi COMMAND`; its errors are one line each."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from prefect_ttapi.cli.commands import app
from prefect_ttapi.cli.reporting import complain
from prefect_ttapi.errors import SigningError, StoreError, TTAPIError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status, which the command's help explains."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # prompts are in every script, and terminals are not
    try:
        status = app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        asked = f"prefect-ttapi {words[0]}" if words and words[0] in app else "prefect-ttapi"
        complain(f"{error} (see {asked} --help)")
        return 2
    except BrokenPipeError:
        # whoever read has read enough; Python's own flush at the end is not to complain of it either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, StoreError, SigningError, TTAPIError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        complain("interrupted; nothing is left half done")
        return 130
    return status if isinstance(status, int) else 0
