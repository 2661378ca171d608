"""Which of the claims that were seen have a holder: all are looked at again until that is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from prefect_ttapi.cli.findings import Finding, Kind
from prefect_ttapi.cli.reporting import Step, Tell
from prefect_ttapi.cli.side_by_side import side_by_side
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.documents import Holder, State
from prefect_ttapi.ledger.shelf import shelf_of
from prefect_ttapi.storage.store import ImageStore

#: Seconds between looks: a holder renews its claim four times in its life, which is a minute.
_PAUSE: Final = 5.0


@dataclass(frozen=True)
class Claimed:
    """A claim as it was seen: its document's key and tag, its holder, and when, on `leases.clock`."""

    key: str
    tag: str
    token: str
    holder: Holder
    ttl: float
    since: float


def dead_claims(store: ImageStore, claims: list[Claimed], tell: Tell) -> Iterator[Finding]:
    """Those whose holder is surely gone, or let the claim's life pass unchanged while this process watched."""
    standing = claims
    while standing:
        left: list[Claimed] = []
        looks = side_by_side(lambda claim: (claim, *_look(store, claim)), standing)
        for claim, why, unchanged_for in looks:
            if why:
                held = f"held by run {claim.holder.run_id} on {claim.holder.host}: {why}"
                yield Finding(
                    Kind.DEAD_CLAIM, store.uri(claim.key), held, records=(claim.key,), tag=claim.tag
                )
            elif unchanged_for is not None:
                left.append(claim)
        standing = left
        if standing:
            ends = [claim.since + claim.ttl for claim in standing]
            longest = max(0.0, max(ends) - leases.clock())
            tell(Step(f"watching claims, {longest:.0f} s to go", len(claims) - len(standing), len(claims)))
            time.sleep(min(max(min(ends) - leases.clock(), 0.0), _PAUSE))


def _unchanged_for(store: ImageStore, claim: Claimed) -> float | None:
    """Seconds for which it surely has not changed; None where it has."""
    asked = leases.clock()
    shelf, request_hash = shelf_of(store, claim.key)
    seen = shelf.read(request_hash)
    same = seen is not None and seen.tag == claim.tag and seen.document.state is State.CLAIMED
    return asked - claim.since if same else None


def _look(store: ImageStore, claim: Claimed) -> tuple[str | None, float | None]:
    """Why the claim is dead, if it is, and for how long it has not changed; None where it has."""
    # asked first: whoever ends writes what became of the request before its lease goes
    gone = leases.is_gone(claim.holder, claim.token)
    unchanged_for = _unchanged_for(store, claim)
    if unchanged_for is None:
        return None, None
    return _why_dead(claim, gone, unchanged_for), unchanged_for


def _why_dead(claim: Claimed, gone: bool, unchanged_for: float) -> str | None:
    if gone:
        return "that process is gone"
    return f"not renewed for {unchanged_for:.0f} seconds" if unchanged_for >= claim.ttl else None
