"""Options that `run` and `retry` share with what carries them out.

Nothing heavy is imported here: `--help` shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cyclopts import Parameter


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
