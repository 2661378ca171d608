"""Several real processes, one store: who pays when they race, and when one is killed."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from prefect_ttapi.errors import UnknownOutcomeError
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import Holder
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import API, generation_of, request_of, stored
from tests.support.ledgers import acquire, recorded
from tests.support.processes import context, start

PROCESSES, KEYS = 6, 10


def pay_for_all(settings: dict, number: int, together: object, calls: Queue) -> None:
    """Ask for every request in an order of one's own; report each send and what was recorded."""
    store = ImageStore(**settings)
    ledger = Ledger(store, API, f"run-{number}")
    order = list(range(KEYS))
    random.Random(number).shuffle(order)  # noqa: S311 - chance, not secrecy
    sent, records = [], {}
    together.wait()
    for key in order:
        request = request_of(f"prompt {key}")
        found = acquire(ledger, request.request_hash)
        if isinstance(found, Claim):
            with found as claim:
                claim.before_sending()
                sent.append(key)
                time.sleep(0.005)
                image = stored(store, f"image {key} by {number}".encode())
                found = recorded(claim, generation_of(request, image))
        records[key] = (found.run_id, found.generation.images[0].sha256, found.maybe_paid, found.also_paid)
    calls.put((number, sent, records))


def test_six_processes_pay_once_for_each_request(store: ImageStore) -> None:
    """6 processes that ask for the same 10 requests at the same moment send 10, and all see the same records."""
    settings = store.model_dump(mode="json", context={"include_secrets": True})
    together, calls = context.Barrier(PROCESSES), context.Queue()
    racers = [start(pay_for_all, settings, number, together, calls) for number in range(PROCESSES)]
    results = [calls.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    sends = [key for _, sent, _ in results for key in sent]
    assert sorted(sends) == list(range(KEYS))
    payers = {key: f"run-{number}" for number, sent, _ in results for key in sent}
    for _, _, records in results:
        assert {key: record[0] for key, record in records.items()} == payers
        assert records == results[0][2]
        assert all(record[2:] == ((), ()) for record in records.values())


def hold(settings: dict, run_id: str, sending: bool, ready: Queue) -> None:
    """Claim, perhaps get ready to send, and never come back."""
    ledger = Ledger(ImageStore(**settings), API, run_id)
    claim = acquire(ledger, request_of().request_hash).__enter__()
    if sending:
        claim.before_sending()
    ready.put(os.getpid())
    time.sleep(600)


@pytest.fixture
def killed_holder(store: ImageStore) -> ImageStore:
    """A store in which a process that was killed left its claim."""
    settings = store.model_dump(mode="json", context={"include_secrets": True})
    ready = context.Queue()
    holder = start(hold, settings, "run-dead", True, ready)
    ready.get(timeout=60)
    assert isinstance(Ledger(store, API, "run-x").try_acquire(request_of().request_hash), Waiting)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    return store


def test_a_killed_holder_on_this_machine_blocks_nobody(killed_holder: ImageStore) -> None:
    """A claim whose process was killed is void at once here; the new payer's record names what may be paid."""
    request, store = request_of(), killed_holder
    claim = Ledger(store, API, "run-new").try_acquire(request.request_hash)
    assert isinstance(claim, Claim)
    with claim:
        claim.before_sending()
        record = recorded(claim, generation_of(request, stored(store)))
    assert [note.run_id for note in record.maybe_paid] == ["run-dead"]


def test_a_retry_of_the_killed_run_does_not_send_again(killed_holder: ImageStore) -> None:
    """Within one run a request is sent once: a retry after a kill reports the unknown outcome."""
    ledger = Ledger(killed_holder, API, "run-dead")
    with pytest.raises(UnknownOutcomeError, match="start a new run"):
        acquire(ledger, request_of().request_hash)


def test_a_killed_holder_on_another_machine_blocks_for_its_ttl(folder_store: ImageStore) -> None:
    """Where it can't be seen that the holder is dead, its claim is waited out, by the waiter's own clock."""
    settings = folder_store.model_dump(mode="json")
    ready = context.Queue()
    holder = start(hold_elsewhere, settings, ready)
    ready.get(timeout=60)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    ledger = Ledger(folder_store, API, "run-new")
    assert isinstance(ledger.try_acquire(request_of().request_hash), Waiting)
    claim = acquire(ledger, request_of().request_hash)
    assert isinstance(claim, Claim)
    assert [note.run_id for note in claim.maybe_paid] == ["run-dead"]


def hold_elsewhere(settings: dict, ready: Queue) -> None:
    """Claim with a short TTL, as if on another machine, and never come back."""
    store = ImageStore(**settings)
    ledger = Ledger(store, API, "run-dead", ttl=1.0)
    request_hash = request_of().request_hash
    claim = acquire(ledger, request_hash)
    key = ledger.documents.key(request_hash)
    data, tag = store.read_document(key)
    document = json.loads(data)
    document["holder"]["place"] = "another machine"
    store.compare_and_swap(key, json.dumps(document).encode(), tag)
    ready.put(claim.token)
    time.sleep(600)


def me() -> Holder:
    return leases.this_process("run")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells processes apart")
def test_only_what_is_surely_dead_is_called_dead() -> None:
    """A process is gone if its id is unused, used again by a later process, or a zombie's; else it is alive."""
    child = subprocess.Popen(["sleep", "600"])
    holder = me().model_copy(update={"pid": child.pid, "started": started(child.pid)})
    assert not leases.is_gone(holder, "token")
    assert leases.is_gone(holder.model_copy(update={"started": holder.started - 1}), "token")
    assert not leases.is_gone(holder.model_copy(update={"place": "another machine"}), "token")
    assert not leases.is_gone(holder.model_copy(update={"place": None}), "token")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected
    assert leases.is_gone(holder, "token")
    child.wait()
    assert leases.is_gone(holder, "token")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells processes apart")
def test_who_has_no_file_handles_left_calls_nobody_dead() -> None:
    """Where it can't be told whether a process lives, it does; a claim that is made then is no dead one's either."""
    child = subprocess.Popen(["sleep", "600"])
    holder = me().model_copy(update={"pid": child.pid, "started": started(child.pid)})
    limits, handles = resource.getrlimit(resource.RLIMIT_NOFILE), []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
        with suppress(OSError):  # too many open files
            while True:
                handles.append(os.open(os.devnull, os.O_RDONLY))
        assert not leases.is_gone(holder, "token")
        written = me()
    finally:
        for handle in handles:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        child.kill()
        child.wait()
    assert written == me()


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_a_paused_holder_is_not_dead(folder_store: ImageStore) -> None:
    """A stopped process keeps its claim until the TTL has passed."""
    settings = folder_store.model_dump(mode="json")
    ready = context.Queue()
    holder = start(hold, settings, "run-paused", True, ready)
    ready.get(timeout=60)
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        found = Ledger(folder_store, API, "run-new").try_acquire(request_of().request_hash)
        assert isinstance(found, Waiting)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
