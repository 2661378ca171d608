"""Processes that are killed again and again while they pay: what a store holds then, and an account of who paid."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from prefect_ttapi.cli.checks import verify
from prefect_ttapi.ledger.documents import Document, Documents, Record, State, decode, record_of
from prefect_ttapi.lineage.manifest import read_manifest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.children import child, small_flow, until
from tests.support.payers import THREADS, pay_for_all
from tests.support.prefect_server import PATIENCE, Server
from tests.support.processes import start

API = "sandbox"


def documents(store: ImageStore, api: str = API) -> Iterator[Document]:
    """All of the ledger's documents, each found to make sense."""
    prefix = Documents(store, api).prefix
    for listed in store.list(prefix):
        request_hash = listed.key.removeprefix(prefix).removesuffix(".json")
        found = store.read_document(listed.key)
        assert found is not None
        yield decode(found[0], request_hash, api)


def checked_records(store: ImageStore, paid: Mapping[str, int], api: str = API) -> dict[str, Record]:
    """Once all is done: a record with whole images for each request, which names each payment beside its own.

    Args:
        paid: how often the API was paid for each request, as the API counts.
    """
    found = {document.request_hash: document for document in documents(store, api)}
    assert set(found) == set(paid)
    return {hash_: _checked(store, document, paid[hash_]) for hash_, document in found.items()}


def _checked(store: ImageStore, document: Document, paid: int) -> Record:
    assert document.state is State.GENERATED, "nobody holds a claim any more"
    record = record_of(document, store)
    assert record is not None
    assert len(record.generation.images) == record.generation.request.n
    for image in record.generation.images:
        data = store.read_bytes(image.uri)
        assert len(data) == image.size_bytes
        assert hashlib.sha256(data).hexdigest() == image.sha256
    assert paid <= 1 + len(record.maybe_paid) + len(record.also_paid), "a payment that no record names"
    return record


@dataclass
class Tally:
    """What became of some requests whose payers were killed.

    Attributes:
        kills: by signal.
        requests: that were asked for, each of them by many.
        calls: that reached the API.
        paid: calls that the API was paid for.
        twice: of these, beyond one for each request; all are named by records, else the check fails.
        in_flight: the most that could have been paid for twice: what killed processes had in flight.
        orphans: images that no record names, and half-written files.
    """

    kills: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    calls: int = 0
    paid: int = 0
    twice: int = 0
    in_flight: int = 0
    orphans: int = 0

    def __iadd__(self, other: Tally) -> Tally:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


class Account:
    """Which runs were killed: only for what they may have sent may anybody pay again."""

    def __init__(self, store: ImageStore, sandbox: Sandbox) -> None:
        self._store = store
        self._sandbox = sandbox
        self._killed: list[str] = []
        self._tally = Tally()

    def killed(self, run: str, sign: signal.Signals, in_flight: int) -> None:
        """A run, whose id begins like this, was killed while it may have had so many requests in flight."""
        self._tally.kills[sign.name] += 1
        if sign is signal.SIGKILL:
            self._killed.append(run)
            self._tally.in_flight += in_flight

    def check(self, requests: int) -> Tally:
        """Once all is done: a full read of the store, held against the server's counters."""
        paid = self._sandbox.paid_by_request
        assert len(paid) == requests
        assert sum(paid.values()) <= requests + self._tally.in_flight
        for request_hash, record in checked_records(self._store, paid).items():
            assert record.also_paid == ()
            dead = [note for note in record.maybe_paid if "its holder died" in note.what]
            alive = [note for note in dead if not note.run_id.startswith(tuple(self._killed))]
            assert not alive, f"these were not killed: {alive}"
            assert paid[request_hash] <= 1 + len(dead), "a duplicate call's earlier payer was killed"
        orphans = sum(1 for finding in verify(self._store, quick=True) if finding.wrong)
        self._tally += Tally(
            requests=requests,
            calls=self._sandbox.calls,
            paid=sum(paid.values()),
            twice=sum(paid.values()) - requests,
            orphans=orphans,
        )
        return self._tally


@contextmanager
def flaky(seed: int) -> Iterator[Sandbox]:
    """Answers take 50 to 300 ms; some requests are turned away, some have an unknown outcome."""
    failures = {429: 0.03, 503: 0.03, 504: 0.02}
    with Sandbox(tiny=True, latency=(0.05, 0.3), fail=failures, seed=seed) as sandbox:
        yield sandbox


PROCESSES, RACE = 6, 50


def race(place: ImageStore, seed: int, kills: int) -> Tally:
    """Six processes want the same 50 images, while one after the other is killed and replaced."""
    settings = place.model_dump(mode="json", context={"include_secrets": True})
    chance = random.Random(seed)  # noqa: S311 - chance, not secrecy
    with flaky(seed) as sandbox:
        account, seeds = Account(place, sandbox), itertools.count()
        racers: dict[int, BaseProcess] = {}
        for _ in range(kills):
            while len(racers) < PROCESSES:
                number = next(seeds)
                racers[number] = start(pay_for_all, settings, sandbox.base_url, RACE, number)
            # on a busy machine, most would be killed before they send anything
            patience = 10.0 if len(sandbox.paid_by_request) < RACE else 0.5
            _wait_for_calls(sandbox, sandbox.calls + chance.randint(1, 2), patience)
            time.sleep(chance.uniform(0, 0.1))
            number = chance.choice(list(racers))
            racer = racers.pop(number)
            racer.kill()
            racer.join(PATIENCE)
            account.killed(f"run-{number}-", signal.SIGKILL, in_flight=THREADS)
        for racer in racers.values():
            racer.join(PATIENCE)
            assert racer.exitcode == 0
        return account.check(RACE)


def _wait_for_calls(sandbox: Sandbox, calls: int, patience: float) -> None:
    """Until so many came, or no more seem to come."""
    end = time.monotonic() + patience
    while sandbox.calls < calls and time.monotonic() < end:
        time.sleep(0.005)


BATCH, ONE_OF_EACH = 70, [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def kill_and_go_on(server: Server, place: ImageStore, log: Path, seed: int) -> Tally:
    """A batch of 70 images, killed ten times at any moment, and run again until done: all is whole."""
    chance = random.Random(seed)  # noqa: S311 - chance, not secrecy
    signals = [*ONE_OF_EACH * 3, signal.SIGKILL]
    moments = ["start", *["work"] * 6, *["end"] * 3]
    with flaky(seed) as sandbox:
        account = Account(place, sandbox)
        for sign, moment in zip(chance.sample(signals, k=10), moments, strict=True):
            while not _kill(server, place, sandbox, account, log, sign, moment, chance):
                pass  # it was done before
        for _ in range(5):
            with child(small_flow(place, sandbox, BATCH), server.environment, log) as process:
                if process.wait(PATIENCE) == 0:
                    break
        else:
            raise AssertionError(log.read_text())
        tally = account.check(BATCH)
    with place.open(log.read_text().splitlines()[-1]) as lines:
        rows = list(read_manifest(lines))
    assert [row.row for row in rows] == list(range(BATCH))
    assert all(row.status in ("generated", "cached") and row.images for row in rows)
    return tally


def _kill(
    server: Server,
    place: ImageStore,
    sandbox: Sandbox,
    account: Account,
    log: Path,
    sign: signal.Signals,
    moment: str,
    chance: random.Random,
) -> bool:
    """Start a run and kill it; whether it still ran then."""
    began = len(sandbox.paid_by_request)
    reached = {"start": began, "work": min(BATCH, began + chance.randint(1, 6)), "end": BATCH}[moment]
    with child(small_flow(place, sandbox, BATCH), server.environment, log) as process:
        until(lambda: len(sandbox.paid_by_request) >= reached or process.poll() is not None, log)
        time.sleep(chance.uniform(0, 0.3) if began < reached else chance.uniform(0, 4))
        process.send_signal(sign)
        status = process.wait(PATIENCE)
    claims = [one for one in documents(place) if one.state is State.CLAIMED]
    held = [one for one in claims if one.holder.pid == process.pid]
    assert sign == signal.SIGKILL or not held, log.read_text()
    run = re.search(r"run ([0-9a-f-]{36})\n", log.read_text())
    assert run or not held, log.read_text()
    if status in (0, 1):
        return False
    account.killed(run[1] if run else "nobody", sign, in_flight=len(held))
    return True
