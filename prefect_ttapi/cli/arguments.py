"""The options of commands that have many, as `--help` shows them: each command hands them on as one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

By = Literal["model", "day", "batch"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Paying:
    """Who makes images, what may be paid, and where copies go.

    Attributes:
        credentials: The name of a saved credentials block. Without it, TTAPI_API_KEY and TTAPI_BASE_URL are used.
        sandbox: Start a sandbox and use it. Nothing is paid for.
        content_credentials: With --sandbox, the images have Content Credentials, with a certificate for testing.
        deliver: Where copies of the images go: a folder, s3://bucket/prefix, or block:NAME.
        key: The template of the copies' names. By default it is {slug}-{hash}-{index}.{ext}.
        overwrite: Replace whatever has a copy's name. Otherwise, nothing is paid for a request whose name is taken.
        mark: Mark copies of images that do not say themselves that a model made them, by XMP in the file.
        sign: The name of a saved signer block. Its Content Credentials sign each copy. It implies --mark.
        max_in_flight: How many requests are under way at once. By default it is 8.
        max_images: How many images are paid for at most. The next run continues from there.
        max_usd: How many US dollars are spent at most. It needs a --price for each model.
        price: What a model costs: gpt-image-2=0.04 is the price of an image, gpt-image-2=5/40 the prices of a million
            tokens in and out. Repeat it for each model.
        rate_limit: How many requests are sent per minute at most.
        name: The name of the batch. By default it is "campaign", or the name of the batch that is retried.
        dry_run: Check everything and estimate the cost. Nothing is sent.
    """

    credentials: str | None = None
    sandbox: bool = False
    content_credentials: bool = False
    deliver: str | None = None
    key: str | None = None
    overwrite: bool = False
    mark: bool = False
    sign: str | None = None
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
        prompt_column: The column that holds the prompts, if it is not called "prompt".
        columns: The columns of other request fields, as FIELD=NAME,... For example, size=image_size,model= reads the
            size from the column image_size, and leaves the column model to the key.
        encoding: The encoding of a text file that is not UTF-8, such as windows-1252.
        skip_blank: Skip rows without a prompt.
        model: The model for rows that name none.
        size: The size for rows that name none.
        limit: Read only the first rows, as many as this.
    """

    prompt_column: str | None = None
    columns: Sequence[str] = ()
    encoding: str | None = None
    skip_blank: bool = False
    model: str | None = None
    size: str | None = None
    limit: int | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Preparing:
    """What is made on a Prefect server, and for which store.

    Attributes:
        store: The address of the store: a folder or s3://bucket/prefix. Without it, TTAPI_STORE is used.
        name: The name of both blocks. By default it is images.
        pool: The name of the work pool, which is made for processes if there is none. By default it is images.
        in_flight: How many requests the account may have in flight on all machines. By default it is 16, or
            what it is already.
        endpoint_url: The endpoint of an S3 service other than AWS.
    """

    store: str | None = None
    name: str = "images"
    pool: str = "images"
    in_flight: int | None = None
    endpoint_url: str | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Counting:
    """Which costs are counted, and how they are shown.

    Attributes:
        since: A year, a month or a day in UTC, such as 2026-11. What was paid before is not counted.
        by: What the costs are grouped by.
        price: What a model costs, as for `run`. Without prices, no money is shown.
        max_usd: If more US dollars than this were paid, the exit status is 1.
        sandbox: Count the sandbox's answers instead of the API's.
        endpoint_url: The endpoint of an S3 service other than AWS.
        json: Print a JSON object for each group.
    """

    since: str | None = None
    by: By = "model"
    price: Sequence[str] = ()
    max_usd: float | None = None
    sandbox: bool = False
    endpoint_url: str | None = None
    json: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Verifying:
    """How much of a store is read, and what is repaired.

    Attributes:
        endpoint_url: The endpoint of an S3 service other than AWS.
        delivered: Also look at the copies that batches delivered to this place: a folder, s3://bucket/prefix, or
            block:NAME.
        quick: Compare lengths only, without reading the images.
        repair: Repair what can safely be repaired. The next run pays again for a lost image, and for an answer that
            can't be read.
        delete_orphans: With --repair, also delete half-written files and what nothing refers to, if
            older than an hour.
        json: Print all findings as JSON Lines, with the totals last.
    """

    endpoint_url: str | None = None
    delivered: str | None = None
    quick: bool = False
    repair: bool = False
    delete_orphans: bool = False
    json: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Tracing:
    """What is traced, and where.

    Attributes:
        run: The id of a flow run, instead of an address, to show what it made.
        store: Where the ledger is: a folder, s3://bucket/prefix, or block:NAME.
        endpoint_url: The endpoint of an S3 service other than AWS.
        everywhere: Search all manifests, not only those of the run that paid.
        price: What a model costs, as for `run`.
        json: Print everything as JSON.
    """

    run: str | None = None
    store: str | None = None
    endpoint_url: str | None = None
    everywhere: bool = False
    price: Sequence[str] = ()
    json: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a sandbox behaves.

    Attributes:
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

    host: str = "127.0.0.1"
    port: int = 8780
    latency: str = "0"
    fail: Sequence[str] = ()
    seed: int = 0
    api_key: str | None = None
    items: Literal["model", "b64", "url", "mixed"] = "model"
    tiny: bool = False
    image_bytes: int | None = None
    room: int | None = None
    content_credentials: bool = False
