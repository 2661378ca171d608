"""The commands of `prefect-ttapi`: what each takes, and what `--help` says of it.

Nothing heavy is imported before a command runs: Prefect alone takes more than a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

from cyclopts import App, Parameter

from prefect_ttapi.cli.options import Paying, Reading
from prefect_ttapi.cli.reporting import Loudness, loudness

_DONE: Final = "Exit status: 0 done; 2 it can't be done as asked; 130 interrupted."


def _version() -> str:
    from prefect_ttapi.results import VERSION

    return f"prefect-ttapi {VERSION}"


app = App(
    name="prefect-ttapi",
    help="TTAPI images in Prefect: each image is paid for once, and can be traced.",
    help_format="markdown",
    help_epilogue=_DONE,
    version=_version,
    default_parameter=Parameter(negative="", show_default=False),
)


app.register_install_completion_command(help="Install completion for this shell (zsh, bash, fish) and exit.")


@app.meta.default
def launch(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
    verbose: Annotated[bool, Parameter(alias="-v")] = False,
) -> object:
    """Run a command.

    Args:
        words: The command and its arguments.
        quiet: Print only results, warnings and errors.
        verbose: Show every log line, also those of each task run.
    """
    if quiet and verbose:
        raise ValueError("--quiet and --verbose exclude each other")
    loudness(Loudness.QUIET if quiet else Loudness.VERBOSE if verbose else Loudness.NORMAL)
    return app(words, exit_on_error=False, print_error=False, result_action="return_value")


@app.command(
    help_epilogue="Exit status: 0 every row has its images; 1 some failed, or were left over; "
    "2 the input is wrong, and nothing was sent; 130 interrupted."
)
def run(prompts: str, /, *, store: str, paying: Paying | None = None, reading: Reading | None = None) -> int:
    """Generate and deliver the images of a prompts file.

    Args:
        prompts: A CSV, TSV, text, JSON, Excel or Parquet file. Columns that are no request fields can
            be used in the key.
        store: Where the images are kept: a folder, s3://bucket/prefix, or block:NAME for a saved block.
        paying: What may be paid.
        reading: How the file is read.
    """
    from prefect_ttapi.cli.run import run

    return run(prompts, store, paying or Paying(), reading or Reading())


@app.command(
    help_epilogue="Exit status: 0 every request has its images; 1 some failed again, or were left over; "
    "2 it can't be done, and nothing was sent; 130 interrupted."
)
def retry(store: str, batch: str | None = None, /, *, paying: Paying | None = None) -> int:
    """Retry what failed or was skipped in a batch, as a new batch.

    Copies are delivered only if --deliver and --key are given.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        batch: The batch's id as `ls` shows it, the beginning of the id, or the batch's name. By default
            it is the newest batch.
        paying: What may be paid.
    """
    from prefect_ttapi.cli.run import retry

    return retry(store, batch, paying or Paying())


@app.command
def models() -> None:
    """Show what is legal for each model."""
    from prefect_ttapi.capabilities import RULES

    for model, rules in RULES.items():
        print(model)
        for field, rule in rules.items():
            print(f"  {field:<19}{rule.legal}")


@app.command(
    help_epilogue="Exit status: 0 all is well; 1 something is wrong; 2 wrong arguments; 130 interrupted."
)
def doctor(
    *, store: Sequence[str] = (), credentials: str | None = None, endpoint_url: str | None = None
) -> int:
    """Check everything that a run needs: key, API, clock, stores, versions, and Prefect's server.

    Nothing is paid for, and the key is not sent anywhere.

    Args:
        store: A store to check: a folder, s3://bucket/prefix, or block:NAME. Repeat it for each store.
        credentials: The name of a saved credentials block. Without it, TTAPI_API_KEY and TTAPI_BASE_URL are used.
        endpoint_url: The endpoint of an S3 service other than AWS.
    """
    from prefect_ttapi.cli.doctor import run

    return run(list(store), credentials, endpoint_url)


@app.command(
    help_epilogue="Exit status: 0 done; 1 something could not be deleted; 2 it can't be done as asked; 130 interrupted."
)
def gc(
    store: str,
    /,
    *,
    older_than: str | None = None,
    keep: int | None = None,
    yes: bool = False,
    endpoint_url: str | None = None,
) -> int:
    """Show what a store holds that nobody needs, and delete it on request.

    These are images that nothing refers to, half-written files, parts of batches that ended, and answers in this
    machine's rescue folder that the store has. Manifests and galleries of old batches are among them if --older-than or
    --keep says which batches are old. Images that a record refers to are never deleted.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        older_than: Batches that were written longer ago than this, such as 90d or 12h, are old.
        keep: All batches but this number of the newest are old. With --older-than, both must be true.
        yes: Delete without asking. Without a terminal to ask at, nothing is deleted unless this is given.
        endpoint_url: The endpoint of an S3 service other than AWS.
    """
    from prefect_ttapi.cli.cleaning import run

    return run(store, endpoint_url, older_than, keep, yes=yes)


@app.command
def init(folder: str, /) -> None:
    """Create a folder with prompts, a flow that uses them, and a deployment of the flow.

    Args:
        folder: The folder for them. It is created if needed, and existing files are never overwritten.
    """
    from prefect_ttapi.cli.beginning import run

    run(folder)


@app.command(
    help_epilogue="Exit status: 0 everything is there; 1 a part could not be made, or was left as it is although "
    "another was asked for; 2 it can't be done as asked; 130 interrupted."
)
def bootstrap(
    *,
    store: str | None = None,
    name: str = "images",
    pool: str = "images",
    in_flight: int | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Make on the Prefect server what deployments need, and say what was made, changed or left.

    These are blocks for the API key (from TTAPI_API_KEY and TTAPI_BASE_URL) and for the store, the work pool, the
    concurrency limit ttapi-account, and automations. The command can be repeated, for example with a new key. It
    never leads a block to another store or API, because everything would be paid for again there.

    Args:
        store: The address of the store: a folder or s3://bucket/prefix. Without it, TTAPI_STORE is used.
        name: The name of both blocks. By default it is images.
        pool: The name of the work pool, which is made for processes if there is none. By default it is images.
        in_flight: How many requests the account may have in flight on all machines. By default it is 16, or
            what it is already.
        endpoint_url: The endpoint of an S3 service other than AWS.
    """
    from prefect_ttapi.cli.beginning import bootstrap

    return bootstrap(store, name, pool, in_flight, endpoint_url)


@app.command
def ls(
    store: str,
    /,
    *,
    limit: int = 50,
    price: Sequence[str] = (),
    endpoint_url: str | None = None,
    json: bool = False,
) -> None:
    """List the batches of a store, the newest first, with the results of their requests.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        limit: How many batches are listed at most. By default it is 50.
        price: What a model costs, as for `run`. Without prices, no money is shown.
        endpoint_url: The endpoint of an S3 service other than AWS.
        json: Print a JSON object for each batch.
    """
    from prefect_ttapi.cli.batches import show

    show(store, endpoint_url, limit, price, as_json=json)


@app.command(name="open")
def open_(
    store: str,
    batch: str | None = None,
    /,
    *,
    endpoint_url: str | None = None,
    only_print: Annotated[bool, Parameter(name="--print")] = False,
) -> None:
    """Open the gallery of a batch in a browser; from a private bucket, until Ctrl-C.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        batch: The batch's id as `ls` shows it, the beginning of the id, or the batch's name. By default
            it is the newest batch.
        endpoint_url: The endpoint of an S3 service other than AWS.
        only_print: Print the address, and open nothing.
    """
    from prefect_ttapi.cli.batches import open_gallery

    open_gallery(store, endpoint_url, batch, only_print=only_print)


@app.command(
    help_epilogue="Exit status: 0 done; 1 a record can't be read, or more was paid than --max-usd; "
    "2 it can't be done as asked; 130 interrupted."
)
def costs(
    store: str,
    /,
    *,
    since: str | None = None,
    by: Literal["model", "day", "batch"] = "model",
    price: Sequence[str] = (),
    max_usd: float | None = None,
    sandbox: bool = False,
    endpoint_url: str | None = None,
    json: bool = False,
) -> int:
    """Show what was paid for, according to the records of the ledger.

    Each answer counts once, in the run that paid for it, also if it was paid for again since. "saved" counts images
    that batches found in the store, "maybe paid" counts requests that were sent without an answer, and "in vain" counts
    answers that were never used.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        since: A year, a month or a day in UTC, such as 2026-11. What was paid before is not counted.
        by: What the costs are grouped by.
        price: What a model costs, as for `run`. Without prices, no money is shown.
        max_usd: If more US dollars than this were paid, the exit status is 1.
        sandbox: Count the sandbox's answers instead of the API's.
        endpoint_url: The endpoint of an S3 service other than AWS.
        json: Print a JSON object for each group.
    """
    from prefect_ttapi.cli.costs import run

    return run(store, endpoint_url, since, by, price, max_usd, sandbox=sandbox, as_json=json)


@app.command(
    help_epilogue="Exit status: 0 all is well, or was put right; 1 something is wrong; 2 it can't be told; "
    "130 interrupted."
)
def verify(
    store: str,
    /,
    *,
    endpoint_url: str | None = None,
    quick: bool = False,
    repair: bool = False,
    delete_orphans: bool = False,
    json: bool = False,
) -> int:
    """Read a whole store and report what is wrong with it.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        endpoint_url: The endpoint of an S3 service other than AWS.
        quick: Compare lengths only, without reading the images.
        repair: Repair what can safely be repaired. The next run pays again for a lost image, and for an answer that
            can't be read.
        delete_orphans: With --repair, also delete half-written files and what nothing refers to, if
            older than an hour.
        json: Print all findings as JSON Lines, with the totals last.
    """
    from prefect_ttapi.cli.verify import run

    return run(store, endpoint_url, quick=quick, repairs=repair, delete_orphans=delete_orphans, as_json=json)


@app.command(
    help_epilogue="Exit status: 0 found; 1 a part of the chain is lost, or all of it; 2 wrong arguments; "
    "130 interrupted."
)
def trace(
    address: str | None = None,
    /,
    *,
    run: str | None = None,
    store: str | None = None,
    endpoint_url: str | None = None,
    everywhere: bool = False,
    price: Sequence[str] = (),
    json: bool = False,
) -> int:
    """Show where an image comes from, or what a run made.

    Args:
        address: An image, a delivered copy or a download of one (s3://bucket/key or a path), a manifest, or
            a request's hash.
        run: The id of a flow run, instead of an address, to show what it made.
        store: Where the ledger is: a folder, s3://bucket/prefix, or block:NAME.
        endpoint_url: The endpoint of an S3 service other than AWS.
        everywhere: Search all manifests, not only those of the run that paid.
        price: What a model costs, as for `run`.
        json: Print everything as JSON.
    """
    from prefect_ttapi.cli.trace import run as tell

    return tell(address, run, store, endpoint_url, everywhere=everywhere, prices=price, as_json=json)


@app.command(
    help_epilogue="A prompt can steer the sandbox, e.g. with [[sandbox:status=402]]: see "
    "prefect_ttapi.sandbox.behaviour. " + _DONE
)
def sandbox(
    *,
    host: str = "127.0.0.1",
    port: int = 8780,
    latency: str = "0",
    fail: Sequence[str] = (),
    seed: int = 0,
    api_key: str | None = None,
    items: Literal["model", "b64", "url", "mixed"] = "model",
    tiny: bool = False,
    image_bytes: int | None = None,
    room: int | None = None,
    content_credentials: bool = False,
) -> None:
    """Start a local server that answers like the API and draws placeholders.

    Args:
        host: The address to listen at. By default it is 127.0.0.1, which only this machine can reach.
        port: The port. By default it is 8780; 0 takes any free port.
        latency: How many seconds images take, such as 2 or 0.5-1.5.
        fail: How often calls fail, as NAME:RATE, such as --fail 429:0.1 --fail cut:0.01. The names are 400, moderation,
            401, 402, 403, 404, 408, 413, 422, 425, 429, 499, 500, 502, 503, 504, 520, 521, 522, 524,
            insufficient_quota, no_credit, model_not_permitted, firewall, timeout, failed, cut, hang.
        seed: Another seed leads to other pictures, latencies and failures.
        api_key: Accept only this key. By default any key is accepted.
        items: How images are sent. By default ("model") it depends on the model, as the vendor says.
        tiny: Draw at most 64 pixels a side, whatever size was asked for.
        image_bytes: Fill each PNG up to this number of bytes.
        room: How many calls are worked on at once. Further calls are answered with 429.
        content_credentials: Give the images Content Credentials, with a certificate for testing that is made now.
    """
    from prefect_ttapi.sandbox.server import serve

    serve(
        fail,
        host=host,
        port=port,
        latency=latency,
        seed=seed,
        api_key=api_key,
        items=items,
        tiny=tiny,
        image_bytes=image_bytes,
        room=room,
        content_credentials=content_credentials,
    )
