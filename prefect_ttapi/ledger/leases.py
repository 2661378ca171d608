"""How long a claim is good for: a clock, who this process is, and which holders are gone.

No two machines' clocks are ever compared. A holder counts from before its last write; a waiter counts from
when it first saw that write.
"""

from __future__ import annotations

import os
import socket
import time
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Final

from prefect_ttapi.ledger.documents import Holder

#: Seconds for which an unrenewed claim stands.
TTL: Final = 60.0

#: Parts of the TTL: after which a claim is renewed, after which one that could not be is tried again, after
#: which it is renewed before sending, and after which nothing is sent any more.
RENEW_AFTER: Final = 0.25
RETRY_AFTER: Final = 0.05
PROVE_AFTER: Final = 0.5
SEND_UNTIL: Final = 0.9

#: Claims of this process that still have an owner, by token, each from before it is written.
live: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Return seconds on a clock that also counts while the machine sleeps, where the system has one."""
    return time.clock_gettime(_CLOCK)


def this_process(run_id: str) -> Holder:
    """Return the holder of claims made here and now."""
    pid = os.getpid()
    place, started = _myself(pid)
    return Holder(run_id=run_id, host=socket.gethostname(), place=place, pid=pid, started=started)


def is_gone(holder: Holder, token: str) -> bool:
    """Return whether the holder of claim `token` surely exists no more; that shows for processes of this boot."""
    me = this_process(holder.run_id)
    if holder.place is None or holder.place != me.place:
        return False
    if (holder.pid, holder.started) == (me.pid, me.started):
        return token not in live
    try:
        return not _exists(holder.pid, holder.started)
    except OSError:  # it can't be told, say for want of file handles
        return False


@lru_cache(maxsize=8)
def _myself(pid: int) -> tuple[str | None, int]:
    """Return host, boot and process namespace, where a process id means the same, and when this process started.

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
    """Return when a process started, in ticks since boot, as ids are used again; None: there is no such process.

    Raises:
        OSError: it can't be told.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def lives_here(holder: Holder, token: str) -> bool:
    """Return whether the holder of claim `token` is a process of this boot, and not gone."""
    return holder.place == this_process(holder.run_id).place is not None and not is_gone(holder, token)


def _exists(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's: it exists, and more can't be told
    now = _started(pid)
    return now == started
