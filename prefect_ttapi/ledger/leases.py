"""How long a claim is good for: a clock, who this process is, and threads that renew claims.

No two machines' clocks are ever compared. A holder counts from before its last write; a waiter counts from
when it first saw that write.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

from prefect_ttapi.ledger.documents import Holder

#: Seconds for which an unrenewed claim stands.
TTL: Final = 60.0

#: Parts of the TTL: after which a claim is renewed, after which one that could not be is tried again, after
#: which it is renewed before sending, and after which nothing is sent any more.
RENEW_AFTER: Final = 0.25
RETRY_AFTER: Final = 0.05
PROVE_AFTER: Final = 0.5
SEND_UNTIL: Final = 0.9

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Seconds on a clock that also counts while the machine sleeps, where the system has one."""
    return time.clock_gettime(_CLOCK)


def this_process(run_id: str) -> Holder:
    """The holder of claims made here and now."""
    pid = os.getpid()
    place, started = _myself(pid)
    return Holder(run_id=run_id, host=socket.gethostname(), place=place, pid=pid, started=started)


def is_gone(holder: Holder, token: str) -> bool:
    """Whether the holder of claim `token` surely exists no more; that shows for processes of this boot."""
    me = this_process(holder.run_id)
    if holder.place is None or holder.place != me.place:
        return False
    if (holder.pid, holder.started) == (me.pid, me.started):
        return token not in _live
    try:
        return not _exists(holder.pid, holder.started)
    except OSError:  # it can't be told, say for want of file handles
        return False


@lru_cache(maxsize=8)
def _myself(pid: int) -> tuple[str | None, int]:
    """Host, boot and process namespace, where a process id means the same, and when this process started.

    None where that can't be told: nobody then takes this process for dead before its time.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path(f"/proc/{pid}/ns/pid").readlink()
        started = _started(pid)
    except OSError:
        started = None
    return (None, 0) if started is None else (f"{socket.gethostname()} {boot} {namespace}", started)


def _started(pid: int) -> int | None:
    """When a process started, in ticks since boot, as ids are used again; None: there is no such process.

    Raises:
        OSError: it can't be told.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _exists(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's: it exists, and more can't be told
    now = _started(pid)
    return now == started


#: Claims renewed at once: one connection that hangs must not let all others run out.
_MOST_THREADS: Final = 8


class Renewable(Protocol):
    """A claim, as the renewing threads see it."""

    token: str

    def renew(self) -> float:
        """Renew if it can be done now; when to come back, on `clock`."""


#: Claims of this process that still have an owner.
_live: weakref.WeakValueDictionary[str, Renewable] = weakref.WeakValueDictionary()


def own(claim: Renewable) -> None:
    """Make known that the claim is in use in this process: to be called before it is written."""
    _live[claim.token] = claim


def disown(claim: Renewable) -> None:
    """The claim's owner is done with it."""
    _live.pop(claim.token, None)


class Renewer:
    """A few threads that renew all claims of the process. They end with the last, and start with the next ones."""

    def __init__(self) -> None:
        self._due: dict[str, tuple[float, Renewable]] = {}
        self._changed = threading.Condition()
        self._threads = 0

    def add(self, claim: Renewable, when: float) -> None:
        """Renew the claim from `when` on, on `clock`."""
        with self._changed:
            self._due[claim.token] = when, claim
            if self._threads < min(len(self._due), _MOST_THREADS):
                self._threads += 1
                threading.Thread(target=self._run, name="ttapi-renewals", daemon=True).start()
            self._changed.notify()

    def remove(self, claim: Renewable) -> None:
        """Leave the claim alone from now on."""
        with self._changed:
            self._due.pop(claim.token, None)
            if not self._due:
                self._changed.notify_all()

    def _run(self) -> None:
        while (claim := self._next()) is not None:
            again = claim.renew()
            with self._changed:
                if claim.token in self._due:
                    self._due[claim.token] = again, claim

    def _next(self) -> Renewable | None:
        """The next claim, when it is due; None when there are none left."""
        with self._changed:
            while self._due:
                when, claim = min(self._due.values(), key=lambda due: due[0])
                if (wait := when - clock()) <= 0:
                    self._due[claim.token] = math.inf, claim  # no other thread's, until it is renewed
                    return claim
                self._changed.wait(min(wait, threading.TIMEOUT_MAX))
            self._threads -= 1
            return None


@lru_cache(maxsize=1)
def _renewer_of(pid: int) -> Renewer:  # noqa: ARG001 - threads don't survive a fork
    return Renewer()


def renewer() -> Renewer:
    """The one of this process."""
    return _renewer_of(os.getpid())
