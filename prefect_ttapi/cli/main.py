"""The program, `prefect-ttapi COMMAND` or `python -m prefect_ttapi COMMAND`: its commands, and how it ends.

Nothing heavy is imported before a command runs: Prefect alone takes more than a second.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.types import NonNegativeInt, PositiveInt

from prefect_ttapi.cli.arguments import Counting, Paying, Preparing, Reading, Serving, Tracing, Verifying
from prefect_ttapi.cli.reporting import Loudness, complain, loudness
from prefect_ttapi.errors import SigningError, StoreError, TTAPIError


def _version() -> str:
    from prefect_ttapi.results import VERSION

    return f"prefect-ttapi {VERSION}"


app = App(
    name="prefect-ttapi",
    help="TTAPI images in Prefect: each image is paid for once, and can be traced.",
    help_format="markdown",
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


@app.command
def run(prompts: str, /, *, store: str, paying: Paying | None = None, reading: Reading | None = None) -> int:
    """Generate and deliver the images of a prompts file.

    Exit status: 0 every row has its images; 1 some failed, or were left over; 2 the input is wrong, and nothing was
    sent; 130 interrupted.

    Args:
        prompts: A CSV, TSV, text, JSON, Excel or Parquet file. Columns that are no request fields can
            be used in the key.
        store: Where the images are kept: a folder, s3://bucket/prefix, or block:NAME for a saved block.
        paying: What may be paid.
        reading: How the file is read.
    """
    from prefect_ttapi.cli.run import run

    return run(prompts, store, paying or Paying(), reading or Reading())


@app.command
def retry(store: str, batch: str | None = None, /, *, paying: Paying | None = None) -> int:
    """Retry what failed or was skipped in a batch, as a new batch.

    Copies are delivered only if --deliver and --key are given.

    Exit status: 0 every request has its images; 1 some failed again, or were left over; 2 it can't be done, and nothing
    was sent; 130 interrupted.

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
    """Show what is legal for each model.

    Exit status: 0 done; 2 it can't be done as asked; 130 interrupted.
    """
    from prefect_ttapi.capabilities import RULES

    for model, rules in RULES.items():
        print(model)
        for field, rule in rules.items():
            print(f"  {field:<19}{rule.legal}")


@app.command
def doctor(
    *, store: Sequence[str] = (), credentials: str | None = None, endpoint_url: str | None = None
) -> int:
    """Check everything that a run needs: key, API, clock, stores, versions, and Prefect's server.

    Nothing is paid for, and the key is not sent anywhere.

    Exit status: 0 all is well; 1 something is wrong; 2 wrong arguments; 130 interrupted.

    Args:
        store: A store to check: a folder, s3://bucket/prefix, or block:NAME. Repeat it for each store.
        credentials: The name of a saved credentials block. Without it, TTAPI_API_KEY and TTAPI_BASE_URL are used.
        endpoint_url: The endpoint of an S3 service other than AWS.
    """
    from prefect_ttapi.cli.doctor import run

    return run(list(store), credentials, endpoint_url)


@app.command
def gc(
    store: str,
    /,
    *,
    older_than: str | None = None,
    keep: NonNegativeInt | None = None,
    yes: bool = False,
    endpoint_url: str | None = None,
) -> int:
    """Show what a store holds that nobody needs, and delete it on request.

    These are images that nothing refers to, half-written files, parts of batches that ended, and answers in this
    machine's rescue folder that the store has. Manifests and galleries of old batches are among them if --older-than or
    --keep says which batches are old. Images that a record refers to are never deleted.

    Exit status: 0 done; 1 something could not be deleted; 2 it can't be done as asked; 130 interrupted.

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

    Exit status: 0 done; 2 it can't be done as asked; 130 interrupted.

    Args:
        folder: The folder for them. It is created if needed, and existing files are never overwritten.
    """
    from prefect_ttapi.cli.beginning import run

    run(folder)


@app.command
def bootstrap(*, preparing: Preparing | None = None) -> int:
    """Make on the Prefect server what deployments need, and say what was made, changed or left.

    These are blocks for the API key (from TTAPI_API_KEY and TTAPI_BASE_URL) and for the store, the work pool, the
    concurrency limit ttapi-account, and automations. The command can be repeated, for example with a new key. It
    never leads a block to another store or API, because everything would be paid for again there.

    Exit status: 0 everything is there; 1 a part could not be made, or was left as it is although another was asked for;
    2 it can't be done as asked; 130 interrupted.

    Args:
        preparing: What is made.
    """
    from prefect_ttapi.cli.beginning import bootstrap

    return bootstrap(preparing or Preparing())


@app.command
def ls(
    store: str,
    /,
    *,
    limit: PositiveInt = 50,
    price: Sequence[str] = (),
    endpoint_url: str | None = None,
    json: bool = False,
) -> None:
    """List the batches of a store, the newest first, with the results of their requests.

    Exit status: 0 done; 2 it can't be done as asked; 130 interrupted.

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

    Exit status: 0 done; 2 it can't be done as asked; 130 interrupted.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        batch: The batch's id as `ls` shows it, the beginning of the id, or the batch's name. By default
            it is the newest batch.
        endpoint_url: The endpoint of an S3 service other than AWS.
        only_print: Print the address, and open nothing.
    """
    from prefect_ttapi.cli.batches import open_gallery

    open_gallery(store, endpoint_url, batch, only_print=only_print)


@app.command
def costs(store: str, /, *, counting: Counting | None = None) -> int:
    """Show what was paid for, according to the records of the ledger.

    Each answer counts once, in the run that paid for it, also if it was paid for again since. "saved" counts images
    that batches found in the store, "maybe paid" counts requests that were sent without an answer, and "in vain" counts
    answers that were never used.

    Exit status: 0 done; 1 a record can't be read, or more was paid than --max-usd; 2 it can't be done as asked; 130
    interrupted.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        counting: What is counted.
    """
    from prefect_ttapi.cli.costs import run

    return run(store, counting or Counting())


@app.command
def verify(store: str, /, *, verifying: Verifying | None = None) -> int:
    """Read a whole store and report what is wrong with it.

    Exit status: 0 all is well, or was put right; 1 something is wrong; 2 it can't be told; 130 interrupted.

    Args:
        store: The store: a folder, s3://bucket/prefix, or block:NAME.
        verifying: What is read and repaired.
    """
    from prefect_ttapi.cli.verify import run

    return run(store, verifying or Verifying())


@app.command
def trace(address: str | None = None, /, *, tracing: Tracing | None = None) -> int:
    """Show where an image comes from, or what a run made.

    Exit status: 0 found; 1 a part of the chain is lost, or all of it; 2 wrong arguments; 130 interrupted.

    Args:
        address: An image, a delivered copy or a download of one (s3://bucket/key or a path), a manifest, or
            a request's hash.
        tracing: What is searched.
    """
    from prefect_ttapi.cli.trace import run

    return run(address, tracing or Tracing())


@app.command
def sandbox(*, serving: Serving | None = None) -> None:
    """Start a local server that answers like the API and draws placeholders.

    A prompt can steer the sandbox, e.g. with [[sandbox:status=402]]: see prefect_ttapi.sandbox.behaviour.

    Exit status: 0 done; 2 it can't be done as asked; 130 interrupted.

    Args:
        serving: How it behaves.
    """
    from prefect_ttapi.sandbox.server import serve

    options = asdict(serving or Serving())
    serve(options.pop("fail"), **options)


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
