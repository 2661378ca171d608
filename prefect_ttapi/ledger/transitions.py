"""What may be written over what stands, when a claim ends: functions from a document to the facts of the next.

Each returns these without what names the write, or None where there is nothing to write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeVar

from prefect_ttapi.ledger.documents import (
    Answer,
    Cost,
    Document,
    Kept,
    Payment,
    Record,
    State,
    payment,
    rest_of,
)

Named = TypeVar("Named", Payment, Kept, Cost)


def counts(paid: Record | Kept, not_before: datetime | None, run_id: str) -> bool:
    """Return whether an answer is young enough; what the run itself paid for always is."""
    made = paid.when if isinstance(paid, Kept) else paid.generation.created_at
    return not_before is None or paid.run_id == run_id or made >= not_before


def unread(document: Document, not_before: datetime | None, run_id: str) -> tuple[Kept, ...]:
    """Return the answers that nobody can read yet and that count, the last one first."""
    return tuple(kept for kept in reversed(document.kept) if counts(kept, not_before, run_id))


def is_claim(document: Document | None, token: str) -> bool:
    """Return whether the claim of this token stands."""
    return document is not None and document.state is State.CLAIMED and document.token == token


def facts_of(document: Document) -> dict[str, Any]:
    """Return all that a document says, to be written again: a renewal."""
    names = ("state", "holder", "ttl", "answer", "maybe_paid", "also_paid", "kept")
    return {name: getattr(document, name) for name in names}


def resting(document: Document, state: State, *notes: Payment) -> dict[str, Any]:
    """Give a claim up: what was there before it stands again, and what is not known of earlier sends stays noted."""
    maybe_paid = (*document.maybe_paid, *notes)
    return {
        "state": State.GENERATED if document.answer else State.UNKNOWN if maybe_paid else state,
        "answer": document.answer,
        "maybe_paid": maybe_paid,
        "also_paid": document.also_paid,
        "kept": document.kept,
    }


def released(standing: Document | None, token: str) -> dict[str, Any] | None:
    """Give back the claim of `token`, which surely cost nothing, and strike it off the payments that may be."""
    if standing is None:
        return None
    if is_claim(standing, token):
        return resting(standing, State.RELEASED)
    others = _without(standing.maybe_paid, token)
    if standing.state is State.CLAIMED or others == standing.maybe_paid:
        return None  # somebody else's claim is theirs to write
    return {**facts_of(standing), "maybe_paid": others}


def unknown(standing: Document | None, note: Payment) -> dict[str, Any] | None:
    """Note that the claim of the note's token may have cost something, and gave no images."""
    if standing is None:
        return {"state": State.UNKNOWN, "maybe_paid": (note,)}
    # whoever took the claim over has noted this payment already
    return resting(standing, State.UNKNOWN, note) if is_claim(standing, note.token) else None


def unreadable(standing: Document | None, token: str, answer: Kept) -> dict[str, Any] | None:
    """End the claim of `token` with an answer that nobody can read, whoever paid for that."""
    note = payment(answer.token, answer.run_id, answer.why)
    if standing is None:
        return {"state": State.UNKNOWN, "maybe_paid": (note,), "kept": (answer,)}
    if not is_claim(standing, token):
        return None
    others = standing.model_copy(update={"maybe_paid": _without(standing.maybe_paid, answer.token)})
    return resting(others, State.UNKNOWN, note) | {"kept": (*_without(standing.kept, answer.token), answer)}


def answered(
    standing: Document | None,
    answer: Answer,
    tokens: Collection[str],
    *,
    stands: bool,
    rest: Kept | None = None,
) -> dict[str, Any] | None:
    """Record an answer in hand: it beats any claim, but not an answer that was recorded first and `stands`.

    Whoever else paid, or may have, is named: with a claim that is overruled, its holder; with an answer that came
    second, its own payer.

    Args:
        tokens: of the claims that end with this answer: the one it was paid for under, the one that records it.
        stands: another answer is there, which counts and has its images.
        rest: this one as it came, where not all of its images could be had yet.
    """
    of_this = {"state": State.GENERATED, "answer": answer, "kept": (rest,) if rest else ()}
    if standing is None:
        return of_this
    kept = standing.answer
    if kept is not None and kept.token == answer.token and _count(kept) >= _count(answer):
        return None  # written before, and the store's answer lost; or by whoever found it in a rescue folder
    maybe = _without(standing.maybe_paid, *tokens)
    also = standing.also_paid
    if stands and standing.state is State.GENERATED:
        note = payment(answer.token, answer.run_id, "answered too, after another answer was recorded")
        also = (*_without(also, answer.token), note)
        theirs = rest_of(standing)
        unread = (theirs,) if theirs else ()
        return {**facts_of(standing), "maybe_paid": maybe, "also_paid": also, "kept": unread}
    if standing.holder is not None and standing.token not in tokens:
        what = "held the claim when another answer was recorded"
        maybe = (*maybe, payment(standing.token, standing.holder.run_id, what))
    if kept is not None and stands and kept.token != answer.token:
        note = payment(kept.token, kept.run_id, "was the record, until a late answer beat a refresh")
        also = (*also, note)
    return {**of_this, "maybe_paid": maybe, "also_paid": also}


def replaced(standing: Document | None, facts: Mapping[str, Any]) -> tuple[Cost, ...]:
    """Return what answers cost that were the record once: that of `standing` too, where `facts` have it no longer.

    Args:
        facts: of the document that takes the place of `standing`.
    """
    if standing is None:
        return ()
    before, after = standing.answer, facts.get("answer")
    others = _without(standing.replaced, after.token) if after else standing.replaced
    known_by = {past.token for past in (*others, *([after] if after else []))}
    if before is None or before.token in known_by:
        return others
    try:
        return (*others, Cost.of(before))
    except ValueError:  # of a document that somebody wrote by hand
        return others


def _count(answer: Answer) -> int:
    return len(answer.generation.get("images", ()))


def _without(notes: Iterable[Named], *tokens: str) -> tuple[Named, ...]:
    return tuple(note for note in notes if note.token not in tokens)
