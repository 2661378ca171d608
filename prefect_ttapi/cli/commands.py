"""The commands of `prefect-ttapi`: what each takes, and what `--help` says of it.

Nothing heavy is imported before a command runs: Prefect alone takes more than a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from cyclopts import App, Parameter

_DONE: Final = "Exit status: 0 done; 2 it can't be done as asked; 130 interrupted."


def _version() -> str:
    from prefect_ttapi.results import VERSION

    return f"prefect-ttapi {VERSION}"


app = App(
    name="prefect-ttapi",
    help="TTAPI images in Prefect: each image is paid for once, and can be traced.",
    help_format="plaintext",
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
        words: the command and its arguments.
        quiet: say only what is wrong.
        verbose: show all log lines, each task run's too.
    """
    from prefect_ttapi.cli.reporting import Loudness, loudness

    loudness(Loudness.of(quiet=quiet, verbose=verbose))
    return app(words, exit_on_error=False, print_error=False, result_action="return_value")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Paying:
    """Who makes images, what may be paid, and where copies go.

    Attributes:
        credentials: name of a credentials block; without it TTAPI_API_KEY and TTAPI_BASE_URL are used.
        sandbox: start a sandbox and use it: nothing is paid for.
        deliver: where copies go, written like --store.
        key: template of the delivered keys; {slug}-{hash}-{index}.{ext} if none is given.
        max_in_flight: requests under way at once; 8 if nothing is said.
        max_images: pay for at most so many images; the next run goes on from there.
        max_usd: pay at most so many US dollars, by --price.
        price: what a model costs, MODEL=USD; an image, as gpt-image-2=0.04, or a million tokens in and out,
            as gpt-image-2=5/40. Once for each model.
        rate_limit: at most so many requests per minute.
        name: of the batch; if nothing is said, "campaign", or that of the batch that is tried again.
        dry_run: check everything and count what is paid for; nothing is sent.
    """

    credentials: str | None = None
    sandbox: bool = False
    deliver: str | None = None
    key: str | None = None
    max_in_flight: int = 8
    max_images: int | None = None
    max_usd: float | None = None
    price: Sequence[str] = ()
    rate_limit: float | None = None
    name: str | None = None
    dry_run: bool = False


@Parameter(name="*", group="Reading the file")
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file of prompts is read.

    Attributes:
        prompt_column: the column with the prompts, where it is not called "prompt".
        columns: columns of a request's other fields, FIELD=NAME,...; size=image_size,model= takes one, and leaves
            one to the key.
        encoding: of a text file that is not UTF-8, such as windows-1252.
        skip_blank: pass over rows without a prompt.
        model: for rows without one.
        size: for rows without one.
        limit: only the first rows, so many.
    """

    prompt_column: str | None = None
    columns: Sequence[str] = ()
    encoding: str | None = None
    skip_blank: bool = False
    model: str | None = None
    size: str | None = None
    limit: int | None = None


@app.command(
    help_epilogue="Exit status: 0 every row has its images; 1 some failed, or were left over; "
    "2 the input is wrong, and nothing was sent; 130 interrupted."
)
def run(prompts: str, /, *, store: str, paying: Paying | None = None, reading: Reading | None = None) -> int:
    """Generate and deliver the images of a prompts file.

    Args:
        prompts: CSV, TSV, text, JSON, Excel or Parquet; its columns are request fields, and others serve the key.
        store: where images are kept: a folder, s3://bucket/prefix, or block:NAME for a saved block.
        paying: what may be paid.
        reading: how the file is read.
    """
    from prefect_ttapi.cli.run import run

    return run(prompts, store, paying or Paying(), reading or Reading())


@app.command(
    help_epilogue="Exit status: 0 every request has its images; 1 some failed again, or were left over; "
    "2 it can't be done, and nothing was sent; 130 interrupted."
)
def retry(store: str, batch: str | None = None, /, *, paying: Paying | None = None) -> int:
    """Ask again for what failed in a batch, or was skipped, as a batch of its own.

    Copies are delivered only where --deliver and --key say so.

    Args:
        store: a folder, s3://bucket/prefix, or block:NAME.
        batch: its id as `ls` shows it, the beginning of it, or its name; the newest batch if none is given.
        paying: what may be paid.
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
    """Look whether everything is there that a run needs: key, API, clock, stores, versions, Prefect's server.

    Nothing is paid for, and the key is sent nowhere.

    Args:
        store: a folder, s3://bucket/prefix, or block:NAME; once for each store.
        credentials: name of a credentials block; without it TTAPI_API_KEY and TTAPI_BASE_URL are used.
        endpoint_url: of an S3 service other than AWS.
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
    """Show what a store holds that nobody needs, and delete it.

    That is what nothing names, half-written files, parts of batches that ended, answers in this machine's rescue folder
    that the store has, and old batches (manifest and gallery; never their images), if it is said which are old.

    Args:
        store: a folder, s3://bucket/prefix, or block:NAME.
        older_than: batches that were written longer ago, as 90d or 12h, are old.
        keep: all batches but the last ones, so many, are old; with --older-than, those of them that are older.
        yes: delete without asking; where there is no terminal, nothing is deleted without it.
        endpoint_url: of an S3 service other than AWS.
    """
    from prefect_ttapi.cli.cleaning import run

    return run(store, endpoint_url, older_than, keep, yes=yes)


@app.command
def init(folder: str, /) -> None:
    """Write a file of prompts, a flow that works on it, and a deployment of the flow.

    Args:
        folder: where they go; it is made where it is not there, and files that are there are not written over.
    """
    from prefect_ttapi.cli.beginning import run

    run(folder)


@app.command
def ls(
    store: str, /, *, endpoint_url: str | None = None, price: Sequence[str] = (), json: bool = False
) -> None:
    """List the batches of a store, the newest first, with what became of their requests.

    Args:
        store: a folder, s3://bucket/prefix, or block:NAME.
        endpoint_url: of an S3 service other than AWS.
        price: what a model costs, MODEL=USD, as for `run`; without it no money is told.
        json: a JSON object for each batch.
    """
    from prefect_ttapi.cli.batches import show

    show(store, endpoint_url, price, as_json=json)


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
        store: a folder, s3://bucket/prefix, or block:NAME.
        batch: its id as `ls` shows it, the beginning of it, or its name; the newest batch if none is given.
        endpoint_url: of an S3 service other than AWS.
        only_print: print the address, and open nothing.
    """
    from prefect_ttapi.cli.batches import open_gallery

    open_gallery(store, endpoint_url, batch, only_print=only_print)


@app.command(
    help_epilogue="Exit status: 0 done; 1 a record can't be read; 2 it can't be done as asked; 130 interrupted."
)
def costs(
    store: str,
    /,
    *,
    since: str | None = None,
    by: Literal["model", "day", "batch"] = "model",
    price: Sequence[str] = (),
    sandbox: bool = False,
    endpoint_url: str | None = None,
    json: bool = False,
) -> int:
    """Tell what was paid for, by the records of the ledger.

    Each answer counts once, in the run that paid for it. "saved" are images that batches found in the store;
    "maybe paid" are requests that were sent without an answer; "in vain" are answers that are not used.

    Args:
        store: a folder, s3://bucket/prefix, or block:NAME.
        since: a year, a month or a day, as 2026-11 (UTC).
        by: what the sums are told for.
        price: what a model costs, MODEL=USD, as for `run`; without it no money is told.
        sandbox: count the sandbox's answers, in place of the API's.
        endpoint_url: of an S3 service other than AWS.
        json: a JSON object for each sum.
    """
    from prefect_ttapi.cli.costs import run

    return run(store, endpoint_url, since, by, price, sandbox=sandbox, as_json=json)


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
    """Read a whole store and say what is wrong with it.

    Args:
        store: a folder, s3://bucket/prefix, or block:NAME.
        endpoint_url: of an S3 service other than AWS.
        quick: compare lengths only, without reading the images.
        repair: put right what surely can be. A lost image, and an answer that can't be read, is paid for anew by
            the next run.
        delete_orphans: with --repair, delete what nothing names and half-written files, older than an hour.
        json: all findings as JSON Lines, the totals last.
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
    """Tell who made an image, and what a run made.

    Args:
        address: an image or a delivered copy (s3://bucket/key, a path), a manifest, or a request's hash.
        run: a flow run's id, in place of an address, to tell what it made.
        store: where the ledger is: a folder, s3://bucket/prefix, or block:NAME.
        endpoint_url: of an S3 service other than AWS.
        everywhere: look through all manifests, not only the paying run's.
        price: what a model costs, MODEL=USD, as for `run`.
        json: all of it, as JSON.
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
    port: int = 8787,
    latency: str = "0",
    fail: Sequence[str] = (),
    seed: int = 0,
    api_key: str | None = None,
    items: Literal["model", "b64", "url", "mixed"] = "model",
    tiny: bool = False,
    image_bytes: int | None = None,
    room: int | None = None,
) -> None:
    """Serve a stand-in for the API, which draws placeholders, until Ctrl-C.

    Args:
        host: address to listen at; 127.0.0.1, which only this machine can reach, if nothing is said.
        port: 8787 if nothing is said; 0 is any free one.
        latency: seconds that images take, e.g. 2 or 0.5-1.5.
        fail: NAME:RATE, e.g. --fail 429:0.1 --fail cut:0.01. Names are 400, moderation, 401, 402, 403, 404, 408, 413,
            422, 425, 429, 499, 500, 502, 503, 504, 520, 521, 522, 524, insufficient_quota, no_credit,
            model_not_permitted, firewall, timeout, failed, cut, hang.
        seed: another seed gives other pictures, latencies and failures.
        api_key: accept only this key, in place of any.
        items: how images come; "model" is as the vendor says.
        tiny: draw at most 64 pixels a side, whatever was asked.
        image_bytes: fill each PNG up to this length.
        room: work on so many calls at once; further ones get 429.
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
    )
