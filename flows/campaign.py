"""A campaign: a file of prompts in, images in a folder or on S3 out, each paid for once.

python -m flows.campaign prompts.csv --store ./out
python -m flows.campaign prompts.csv --store s3://bucket/images --deliver s3://shop/assets --key "{name}-{size}.{ext}"

The flow comes with the package, as `prefect-ttapi run`; read it in `prefect_ttapi/cli/run.py`.
"""

from __future__ import annotations

import sys

from prefect_ttapi.cli import main as program
from prefect_ttapi.cli.run import campaign

__all__ = ["campaign", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 when every row has its images, 1 when some failed, 2 when the input is wrong."""
    return program.main(["run", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
