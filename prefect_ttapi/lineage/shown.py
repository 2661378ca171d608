"""Decide what is shown of requests, images and rows, and how: prompts or names in their place, links, inert text.

The ledger and the manifest keep the prompt: they lie in the user's own store, and tell where an image comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import quote

from prefect_ttapi.errors import StoreError
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import StoredImage
from prefect_ttapi.storage.keys import plain_name
from prefect_ttapi.storage.store import ImageStore

#: Characters of a prompt in a caption and in a table's cell, of an error's message, of an address.
CAPTION: Final = 120
CELL: Final = 80
REASON: Final = 300
ADDRESS: Final = 1_024

NOT_RECORDED: Final = "prompt not recorded"


@dataclass(frozen=True)
class Shown:
    """What may be shown in artifacts, pages, logs, events, keys and the metadata of delivered objects.

    Attributes:
        prompts: whether prompts may, and what models made of them.

    >>> request = ImageRequest(prompt="a new car")
    >>> Shown().prompt(request), Shown(prompts=False).prompt(request)
    ('a new car', 'request b2de0737ccb6')
    """

    prompts: bool = True

    def prompt(self, request: ImageRequest) -> str:
        """Return the prompt, or the request's name, which a key template's `slug` is then made of, too."""
        return request.prompt if self.prompts else _name(request.request_hash)

    def withheld(self, request: ImageRequest) -> str:
        """Return the prompt if nothing may quote it, else an empty text."""
        return "" if self.prompts else request.prompt

    def image(self, image: StoredImage) -> StoredImage:
        """Return the image, without its revised prompt if need be."""
        return image if self.prompts else image.model_copy(update={"revised_prompt": None})

    def row(self, row: Row) -> Row:
        r"""Return the row, if need be without prompts, what was given of an illegal item, and quotes of the prompt.

        >>> row = Row(row=0, status="failed", given={"prompt": "a new car", "n": 0}, error="'a new car' is too long")
        >>> shown = Shown(prompts=False).row(row)
        >>> shown.prompt, shown.error
        ('prompt not recorded', "'prompt not recorded' is too long")
        >>> Shown(prompts=False).row(row.model_copy(update={"given": {"prompt": "a new\n car "}})).error
        "'prompt not recorded' is too long"
        """
        if self.prompts:
            return row
        named = {"prompt": _name(row.request_hash), **row.asked} if row.request_hash else None
        withheld = {
            "request": None,
            "given": named or (row.given and {"prompt": NOT_RECORDED, "model": row.model}),
            "images": tuple(map(self.image, row.images)),
            "error": row.error and _unquoted(row.error, row.prompt),
            "maybe_paid": tuple(_unquoted(note, row.prompt) for note in row.maybe_paid),
        }
        return row.model_copy(update=withheld)


#: Last words of names under which people keep secrets; `key` alone is a place or a name.
_SECRETS: Final = re.compile(
    r"(^|_)(passwo?rd|passwd|pwd|passphrase|secret|token|credentials?|authorization|bearer"
    r"|(api|access|secret|private|auth|account|encryption)_?key)$"
)
#: How secrets themselves look: keys of OpenAI and its like, AWS, GitHub, Google, Slack, JSON Web Tokens, PEM.
_SECRET_TEXT: Final = re.compile(
    r"\b(sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[opsu]_[A-Za-z0-9]{30,}|\bAIza[\w-]{30,}"
    r"|\bxox[abprs]-[\w-]{10,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|\bBearer +[\w.~+/-]{16,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def secrets_among(values: Mapping[str, Any]) -> set[str]:
    """Return the names of values that look like a secret, which no manifest is to hold.

    >>> sorted(secrets_among({"Api Key": "x", "key": "a.png", "tokens": 3, "note": "sk-Marked0123456789abcd"}))
    ['Api Key', 'note']
    """
    return {
        name
        for name, value in values.items()
        if _SECRETS.search(plain_name(str(name))) or (isinstance(value, str) and _SECRET_TEXT.search(value))
    }


def _name(request_hash: str) -> str:
    return f"request {request_hash[:12]}"


def _unquoted(text: str, prompt: str) -> str:
    # errors are one line, whatever the prompt was
    quote = r"\s+".join(map(re.escape, prompt.split()))
    return re.sub(rf"(?<!\w){quote}(?!\w)", NOT_RECORDED, text) if quote else text


class StoreLinks:
    """Links to the objects of some stores, for the artifacts of one run; signed ones are kept nowhere else.

    Attributes:
        end: when the first of the links given so far ends, UTC; None while none of them is signed.
    """

    def __init__(self, *stores: ImageStore | None) -> None:
        self._stores = [store for store in stores if store]
        self.end: datetime | None = None

    def to(self, uri: str) -> str:
        """Return the public address of `uri`, else a signed one, else `uri` itself."""
        for store in self._stores:
            with suppress(StoreError):  # it is in another store, or in a folder, which signs nothing
                if found := self._in(store, uri):
                    return found
        return uri

    def notes(self) -> list[str]:
        """Return a line that says when signed links end; temporary credentials may end sooner."""
        end = f"{self.end:%Y-%m-%d %H:%M} UTC" if self.end else ""
        return [f"Links are signed and end on {end} at the latest."] if end else []

    def _in(self, store: ImageStore, uri: str) -> str | None:
        if store.public_base_url or not store.signed_links:
            return store.public_url(uri)
        end = datetime.now(UTC) + timedelta(seconds=store.signed_links)
        signed = store.presign(uri, store.signed_links)
        self.end = min(self.end or end, end)
        return signed


#: Characters that reorder or hide what stands around them. Joiners stay: emoji and Persian need them.
_DIRECTION: Final = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

#: Control characters, line and paragraph separators, and lone surrogates, which no file can hold.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

#: What Markdown or HTML could take for markup: every ASCII character but these. Escapes are numbers, which
#: both understand.
_MARKUP: Final = re.compile(r"[\x00-\x7f](?<![A-Za-z0-9 ,.;])")

#: A table's cell is Markdown in one of Prefect's two UIs and plain text in the other: text without any of
#: this means the same in both. An underscore between letters is none of it, names of files are full of them.
_ACTIVE: Final = re.compile(
    r"[\\`*~<>\[\]{}|&!@]|(?<![^\W_])_|_(?![^\W_])|^[-+#=]|^\d+[.)]|https?://|www\.", re.IGNORECASE
)

_LINKED: Final = re.compile(r"(https?|s3|file)://", re.IGNORECASE)


def counted(count: int, noun: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "image"), counted(1200, "image")
    ('1 image', '1,200 images')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def places(noun: str, numbers: Sequence[int], most: int = 5) -> str:
    """Return in words where something is, at most so many of the places by their numbers.

    >>> places("line", [7]), places("line", [1, 2, 4]), places("line", [1, 2, 4], most=2)
    ('line 7', 'lines 1, 2 and 4', 'lines 1, 2 and 1 more')
    """
    first = [f"{number}" for number in numbers[:most]]
    if len(numbers) == 1:
        return f"{noun} {first[0]}"
    last = f"{len(numbers) - most:,} more" if len(numbers) > most else first.pop()
    return f"{noun}s {', '.join(first)} and {last}"


def one_line(text: str, limit: int) -> str:
    r"""Return `text` on one line of at most `limit` characters, without characters that control or reorder.

    >>> one_line("a  lighthouse,\n at dusk", 14)
    'a lighthouse,…'
    """
    # no more than could be needed: a prompt may have 32,000 characters
    start = _DIRECTION.sub("", text[: 8 * limit])
    line = " ".join(_CONTROL.sub(" ", start).split())
    if len(line) <= limit and len(text) <= 8 * limit:
        return line
    return line[: limit - 1].rstrip(" \u200d") + "…"


def inert(text: str) -> str:
    """Return `text` as itself in HTML, in its attributes and in Markdown: nothing in it is markup.

    >>> inert("<b> & *x*")
    '&#60;b&#62; &#38; &#42;x&#42;'
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


def cell(text: str) -> str:
    """Return `text`, on one line already, for the cell of a table artifact, which may or may not read Markdown.

    >>> cell("a red fox"), cell("a <b>red</b> fox")
    ('a red fox', '`a <b>red</b> fox`')
    """
    return "`" + text.replace("`", "'") + "`" if _ACTIVE.search(text) else text


def address(uri: str) -> str:
    """Return `uri` as an address to link to, percent-encoded where need be, or nothing if it is none.

    >>> address("s3://bucket/a b.png"), address("javascript:alert(1)")
    ('s3://bucket/a%20b.png', '')
    """
    return quote(uri, safe="/:?#@!$&()*+,;=%-._~[]", errors="replace") if _LINKED.match(uri) else ""


def in_bytes(size: int) -> str:
    """Return a size in B, kB, MB, GB or TB.

    >>> in_bytes(999), in_bytes(1_234_567)
    ('999 B', '1.2 MB')
    """
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1_000
    return f"{amount:,.1f} TB"
