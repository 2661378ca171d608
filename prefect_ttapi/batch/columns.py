"""Tell the columns of a prompts file apart: fields of a request, values for the key template, or neither."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prefect_ttapi.batch.tables import MOST_COLUMNS, Row, Unfit
from prefect_ttapi.errors import KeyTemplateError
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.keys import NAMES, KeyTemplate, is_blank, plain_name

#: Names to which key templates give a meaning of their own, whatever a value says.
_TAKEN: Final = frozenset(NAMES) - {"name", "slug"}

#: Control characters but tab and line ends, and what UTF-8 could not decode.
_NO_TEXT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

#: By whether it is a byte that could not be decoded.
_NOT_DECODED: Final = (
    "a lone surrogate, which is no character",
    "something that is no text in UTF-8, or in the encoding given: save the file as UTF-8, or name its encoding, "
    "e.g. --encoding windows-1252",
)


@dataclass(frozen=True)
class Columns:
    """The meaning of a row's cells, with their positions: fields, values, or neither for want of a name.

    Attributes:
        fields, values: positions by name.
        needed: the values that a key template needs.
        nameless: positions of columns that have no name, but `index`, the first of a table, which has row numbers.
        problems: of the names themselves; with any, the rest must not be used.
    """

    fields: Mapping[str, int]
    values: Mapping[str, int]
    problems: Sequence[str]
    needed: frozenset[str] = frozenset()
    nameless: Sequence[int] = ()
    index: int | None = None

    def fields_of(self, row: Row) -> dict[str, str]:
        """Return the request's fields: the prompt as it stands, others trimmed, without those that are empty."""
        texts = {name: cell for name, at in self.fields.items() if isinstance(cell := row.cells[at], str)}
        return {
            name: text if name == "prompt" else text.strip() for name, text in texts.items() if text.strip()
        }

    def values_of(self, row: Row) -> dict[str, str | None]:
        """Return the other columns' texts, as they stand."""
        cells = ((name, row.cells[at]) for name, at in self.values.items())
        return {name: cell for name, cell in cells if not isinstance(cell, Unfit)}

    def is_blank(self, row: Row) -> bool:
        """Return whether the row has no prompt."""
        return "prompt" in self.fields and is_blank(row.cells[self.fields["prompt"]])

    def faults_in(self, row: Row) -> Iterator[str]:
        """Return the faults of cells: what can't be text in any of them, what can't be used in some."""
        used = set(self.fields.values())
        for at, (name, cell) in enumerate(zip(row.names, row.cells, strict=True)):
            odd = _odd(cell) if isinstance(cell, str) else None
            if odd and (at in used or odd in _NOT_DECODED):
                yield f"{quoted(name)} holds {odd}"
        for at in self.nameless:
            if not is_blank(row.cells[at]):
                yield (
                    f"has a cell in column {at + 1}, which has no name of letters or digits: give it one; or does "
                    "a cell before it lack its quotation marks?"
                )
        for name, at in self.fields.items():
            if isinstance(cell := row.cells[at], Unfit):
                yield f"{name} holds {cell.what}: text is needed"
        if self.is_blank(row):
            yield "the prompt is blank: fill it in, or pass over such rows with --skip-blank"
        for name in sorted(self.needed & self.values.keys()):
            cell = row.cells[self.values[name]]
            if isinstance(cell, Unfit):
                yield f"{name} holds {cell.what}, of which no key can be made"
            elif is_blank(cell):
                yield f"{name} is {'null' if cell is None else 'blank'}, and the key template needs it"


def columns_of(names: Sequence[str], wanted: Mapping[str, str | None], key: str | None = None) -> Columns:
    """Return the meaning of the columns for rows with these names.

    Args:
        wanted: columns by field: `{"prompt": "caption", "size": None}`.
        key: the template that the values are to fill.

    >>> columns_of(("Prompt", " SIZE", "Product ID"), {"prompt": "prompt"}).values
    {'product_id': 2}
    """
    if len(names) > MOST_COLUMNS:
        return Columns({}, {}, [f"has {len(names):,} columns; the most is {MOST_COLUMNS:,}: leave out some"])
    asked = [
        (field, at)
        for field, column in wanted.items()
        if column
        for at, name in enumerate(names)
        if _is(name, column)
    ]
    taken = {at for _, at in asked}
    plain = [(name, at) for at, name in enumerate(map(plain_name, names)) if at not in taken]
    asked += [(name, at) for name, at in plain if name in ImageRequest.model_fields and name not in wanted]
    taken = {at for _, at in asked}
    # a shop's own `Size` keeps its capital, since `{size}` is the template's
    others = [
        (names[at].strip() if name in _TAKEN else name, at) for name, at in plain if name and at not in taken
    ]
    nameless = [at for name, at in plain if not name]
    problems = [f"the name {quoted(name)} holds {odd}" for name in names if (odd := _odd(name))]
    problems += [*_twice(names, asked), *_twice(names, others)]
    if "prompt" not in dict(asked):
        problems.append(
            f"no column is named {quoted(wanted['prompt'] or '')}; columns: {listed(names)}. Name the one that holds "
            "the prompts: --prompt-column, or prompt_column="
        )
    index = 0 if nameless[:1] == [0] else None
    return Columns(
        dict(asked),
        dict(others),
        problems,
        _needed(key, [name for name, _ in others]),
        [at for at in nameless if at != index],
        index,
    )


def _needed(key: str | None, names: Sequence[str]) -> frozenset[str]:
    try:
        return KeyTemplate(key, names).needed if key else frozenset()
    except KeyTemplateError:
        return frozenset()  # told with the batch's other problems


def warning_for(name: str, *, meant: bool = False) -> str | None:
    """Return a warning about a value's name, or None; the name is `meant` if its field has another column.

    >>> warning_for("modle"), warning_for("sku")
    ('it is a value for the key template; did you mean model?', None)
    """
    if name in _TAKEN:
        return (
            f"{{{name}}} in a key template is not this column: give the column another name to use it there"
        )
    near = difflib.get_close_matches(name[:40], ImageRequest.model_fields, n=1, cutoff=0.75)
    return f"it is a value for the key template; did you mean {near[0]}?" if near and not meant else None


def quoted(text: str) -> str:
    """Return `text` in quotation marks on one line, cut where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _is(name: str, wanted: str) -> bool:
    plain = plain_name(wanted)
    return name.strip() == wanted.strip() or bool(plain and plain_name(name) == plain)


def listed(names: Sequence[str]) -> str:
    """Return the first of a file's columns, for a message."""
    return ", ".join(map(quoted, names[:20])) or "none"


def _twice(names: Sequence[str], group: Sequence[tuple[str, int]]) -> Iterator[str]:
    first: dict[str, int] = {}
    for name, at in group:
        if first.setdefault(name, at) != at:
            yield f"columns {quoted(names[first[name]])} and {quoted(names[at])} are both {name}: rename one of them"


def _odd(text: str) -> str | None:
    found = _NO_TEXT.search(text)
    if found is None:
        return None
    if found[0] >= "\ud800":
        return _NOT_DECODED["\udc80" <= found[0] <= "\udcff"]
    wide = "or, if the file is UTF-16, say --encoding utf-16" if found[0] == "\0" else "there"
    return f"the control character U+{ord(found[0]):04X}: take it out {wide}"
