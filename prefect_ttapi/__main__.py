"""`python -m prefect_ttapi` is `prefect-ttapi`."""

import sys

from prefect_ttapi.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
