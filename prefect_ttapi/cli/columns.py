"""The meaning of a prompts file's columns: the prompt, a field of the request, or a value for the key template."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prefect_ttapi.cli.tables import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import NAMES

MOST_COLUMNS: Final = 1_000

#: Names to which key templates give a meaning of their own, whatever a value says.
_TAKEN: Final = frozenset(NAMES) - {"name", "slug"}

#: Control characters but tab and line ends, and what UTF-8 could not decode.
_NO_TEXT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Plan:
    """The meaning of a row's cells, by their position: fields, values, or neither for want of a name.

    `problems` are those of the names themselves; with any, the rest must not be used.
    """

    fields: Mapping[int, str]
    values: Mapping[int, str]
    nameless: Sequence[int]
    problems: Sequence[str]

    def fields_of(self, row: Row) -> dict[str, str]:
        """Return the request's fields: the prompt as it stands, others trimmed, without those that are empty."""
        cells = {name: row.texts[at] for at, name in self.fields.items()}
        trimmed = {name: text.strip() for name, text in cells.items() if name != "prompt"}
        return {"prompt": cells["prompt"]} | {name: text for name, text in trimmed.items() if text}

    def values_of(self, row: Row) -> dict[str, str]:
        """Return the other columns' texts, as they stand."""
        return {name: row.texts[at] for at, name in self.values.items()}

    def faults_in(self, row: Row) -> Iterator[str]:
        """Return the faults of cells, whatever their column."""
        for name, text in zip(row.names, row.texts, strict=True):
            if odd := _odd(text):
                yield f"{quoted(name)} holds {odd}"
        for at in self.nameless:
            if row.texts[at].strip():
                yield f"has a cell in column {at + 1}, which has no name of letters or digits"


def plan_of(names: Sequence[str], prompt_column: str | None) -> Plan:
    """Return the plan for rows with these names.

    >>> plan_of(("Prompt", " SIZE", "Product ID"), None).values
    {2: 'product_id'}
    """
    if len(names) > MOST_COLUMNS:
        return Plan({}, {}, (), [f"has {len(names):,} columns; the most is {MOST_COLUMNS:,}"])
    wanted = prompt_column or "prompt"
    prompts = [at for at, name in enumerate(names) if _is(name, wanted)]
    plain = {at: plain_name(name) for at, name in enumerate(names) if at not in prompts}
    fields = {
        at: name for at, name in plain.items() if name in ImageRequest.model_fields and name != "prompt"
    }
    fields |= dict.fromkeys(prompts, "prompt")
    values = {at: name for at, name in plain.items() if name and at not in fields}
    problems = [f"the name {quoted(name)} holds {odd}" for name in names if (odd := _odd(name))]
    problems += [*_twice(names, fields), *_twice(names, values)]
    if not prompts:
        known = ", ".join(map(quoted, names[:20])) or "none"
        problems.append(
            f"no column is named {quoted(wanted)}; columns: {known}. Name the one that holds the prompts: "
            "--prompt-column, or prompt_column="
        )
    return Plan(fields, values, [at for at, name in plain.items() if not name], problems)


def plain_name(name: str) -> str:
    """Return a column's name as key templates use it: an identifier, or empty where none can be made.

    >>> plain_name(" Product-ID (new)"), plain_name("Größe"), plain_name("2nd line"), plain_name("#")
    ('product_id_new', 'größe', '_2nd_line', '')
    """
    lower = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).lower())
    signs = "".join(sign if f"_{sign}".isidentifier() else "_" for sign in lower)
    plain = re.sub("_+", "_", signs).strip("_")
    return plain if not plain or plain.isidentifier() else f"_{plain}"


def nearest_field(name: str) -> str | None:
    """Return the request field that `name` may be a misspelling of.

    >>> nearest_field("modle"), nearest_field("sku")
    ('model', None)
    """
    return next(iter(difflib.get_close_matches(name[:40], ImageRequest.model_fields, n=1, cutoff=0.75)), None)


def warning_for(name: str) -> str | None:
    """Return the oddity of a value's name that is no error, or None."""
    if name in _TAKEN:
        return (
            f"{{{name}}} in a key template is not this column: give the column another name to use it there"
        )
    field = nearest_field(name)
    return f"it is a value for the key template; did you mean {field}?" if field else None


def quoted(text: str) -> str:
    """Return `text` in quotation marks on one line, cut where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _is(name: str, wanted: str) -> bool:
    plain = plain_name(wanted)
    return name.strip() == wanted.strip() or bool(plain and plain_name(name) == plain)


def _twice(names: Sequence[str], group: Mapping[int, str]) -> Iterator[str]:
    first: dict[str, int] = {}
    for at, name in group.items():
        if first.setdefault(name, at) != at:
            yield f"columns {quoted(names[first[name]])} and {quoted(names[at])} are both {name}"


def _odd(text: str) -> str | None:
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    if found[0] >= "\ud800":
        return "something that is not UTF-8 text: save the file as UTF-8"
    return f"the control character U+{ord(found[0]):04X}"
