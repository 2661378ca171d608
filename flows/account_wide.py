"""A batch that shares an account with others: never more requests in flight than the account allows, on all machines.

prefect gcl create ttapi-account --limit 16
python -m flows.account_wide flows/prompts.csv

Each run takes as many slots of Prefect's concurrency limit as it has requests in flight, once and for the whole batch,
and waits until there are as many: a slot for each request would cost it a quarter of a second. What a process can find
out by itself, `generate_batch` does without: see `max_in_flight`, `rate_limit`, and how it slows down after a 429.
"""

import sys

from prefect import flow
from prefect.concurrency.sync import concurrency

from prefect_ttapi import BatchReport, ImageStore, TTAPICredentials, generate_batch, read_prompts


@flow(persist_result=False)
def account_wide(
    prompts: str, store: str = "./images", account: str = "ttapi-account", max_in_flight: int = 8
) -> BatchReport:
    """Generate every prompt of a file, with `max_in_flight` of the slots that all users of the account share."""
    requests = read_prompts(prompts).requests
    # strict: nothing runs without its limit; but a Prefect server that is away for a moment must not end paid work
    with concurrency(account, occupy=max_in_flight, strict=True, raise_on_lease_renewal_failure=False):
        return generate_batch(
            requests,
            TTAPICredentials.from_env(),
            ImageStore(url=store),
            max_in_flight=max_in_flight,
            raise_on_failure=False,
        )


if __name__ == "__main__":
    print(account_wide(sys.argv[1]).summary)
