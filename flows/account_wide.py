"""A batch that shares an account with others: never more requests in flight than the account allows, on all machines.

prefect gcl create ttapi-account --limit 16
python -m flows.account_wide flows/prompts.csv --store ./out --max-in-flight 8 --sandbox

Each run takes as many slots of Prefect's concurrency limit as it has requests in flight, once and for the whole batch,
and waits until there are as many: a slot for each request would cost it a quarter of a second. What a process can find
out by itself, `generate_batch` does without: see `max_in_flight`, `rate_limit`, and how it slows down after a 429.
"""

from __future__ import annotations

import argparse
import sys

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from prefect_ttapi import BatchReport, generate_batch
from prefect_ttapi.batch import check_batch, read_prompts
from prefect_ttapi.cli.running import add_store_options, credentials_from, exit_status, failures, sandbox_if
from prefect_ttapi.cli.stores import store_at
from prefect_ttapi.generation.temporary_server import start_server

ACCOUNT = "ttapi-account"


@flow(persist_result=False)
def account_wide(
    prompts: str, store: str, account: str = ACCOUNT, credentials: str | None = None, max_in_flight: int = 8
) -> BatchReport:
    """Generate every prompt of a file, with `max_in_flight` of the account's slots.

    Args:
        prompts: a file of prompts; its columns are request fields.
        store: a folder, `s3://bucket/prefix`, or `block:NAME` of an image store block.
        account: the concurrency limit that all users of the account share.
        credentials: name of a credentials block; without it TTAPI_API_KEY and TTAPI_BASE_URL are used.
        max_in_flight: requests under way at once, and slots.
    """
    requests = read_prompts(prompts).requests
    # strict: nothing runs without its limit; but a Prefect server that is away for a moment must not end paid work
    with concurrency(account, occupy=max_in_flight, strict=True, raise_on_lease_renewal_failure=False):
        return generate_batch(
            requests,
            credentials_from(credentials),
            store_at(store),
            max_in_flight=max_in_flight,
            raise_on_failure=False,
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 when every row has its images, 1 when some failed, 2 when the input is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.account_wide",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", help="a file of prompts; columns are request fields")
    parser.add_argument("--account", default=ACCOUNT, metavar="LIMIT", help=f"the limit's name ({ACCOUNT})")
    add_store_options(parser)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    with sandbox_if(options.sandbox):
        # Prefect logs a traceback for what goes wrong inside a flow, so all that can be known is found before it
        check_batch(
            read_prompts(options.prompts).requests,
            credentials_from(options.credentials),
            store_at(options.store),
            max_in_flight=options.max_in_flight,
        )
        start_server()
        _check_limit(options.account, options.max_in_flight)
        report = account_wide(
            options.prompts, options.store, options.account, options.credentials, options.max_in_flight
        )
        print(report.summary)
        for line in failures(report):
            print(line, file=sys.stderr)
        return 0 if report.ok else 1


def _check_limit(account: str, slots: int) -> None:
    """ValueError: there is no such limit, or it never has so many slots, so that the run would wait for ever."""
    try:
        with get_client(sync_client=True) as client:
            limit = client.read_global_concurrency_limit_by_name(account)
    except ObjectNotFound:
        raise ValueError(
            f"there is no limit {account!r}: prefect gcl create {account} --limit {slots}"
        ) from None
    if limit.limit < slots:
        raise ValueError(f"the limit {account!r} has {limit.limit} slots: it can't give {slots} to a run")


if __name__ == "__main__":
    sys.exit(main())
