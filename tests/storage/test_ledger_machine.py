"""The ledger through arbitrary interleavings: holders that crash, stall or come late, and answers that get lost.

Three actors ask for one request, on a clock that the test moves. Their claims are in no `with` block, so that nothing
happens but what is chosen: a claim that nobody chooses to renew is that of a stalled holder.
"""

from __future__ import annotations

import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from prefect_ttapi.errors import StoreError, UnknownOutcomeError
from prefect_ttapi.storage import leases
from prefect_ttapi.storage.claims import Claim
from prefect_ttapi.storage.ledger import Ledger, Waiting
from prefect_ttapi.storage.objects import ConflictError, NoAnswerError
from prefect_ttapi.storage.store import ImageStore
from tests.storage.samples import API, generation_of, request_of, stored

TTL = 60.0
REQUEST = request_of()
ACTORS = st.integers(0, 2)
TROUBLES = st.sampled_from([None, None, None, "lost after", "lost before", "own conflict"])


class Troubled:
    """A store whose next conditional write may lose its answer, before or after it was done."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self.trouble: str | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def compare_and_swap(self, key: str, data: bytes, tag: str | None) -> str:
        trouble, self.trouble = self.trouble, None
        if trouble == "lost before":
            raise NoAnswerError("silence")
        new_tag = self._store.compare_and_swap(key, data, tag)
        if trouble == "lost after":
            raise NoAnswerError("silence")
        if trouble == "own conflict":  # the write was sent twice on the way
            raise ConflictError("refused")
        return new_tag


class Holders(RuleBasedStateMachine):
    """What the actors do, beside a plain account of what must be true."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Troubled(ImageStore(url=self.folder.name))
        self.now = 1000.0
        self.runs = [0, 0, 0]  # how many runs each actor has begun
        self.claims: dict[int, Claim] = {}
        self.waiting: dict[int, Waiting] = {}
        self.proven: dict[str, float] = {}  # when each claim was last proven, by its token
        self.sent: set[str] = set()  # tokens of claims that sent and were not refused for free
        self.excused: set[str] = set()  # those that died, timed out, or stalled for a TTL
        self.doubtful_runs: set[str] = set()  # runs that may have sent without knowing what became of it
        self.recorded = False

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize()
    def look_at_the_store(self) -> None:
        self.store.check_once()

    @rule(actor=ACTORS, trouble=TROUBLES, opted_in=st.booleans())
    def ask(self, actor: int, trouble: str | None, opted_in: bool) -> None:
        """An actor without a claim asks: it gets the record, the claim, or has to wait or to refrain."""
        if actor in self.claims:
            return
        self.store.trouble = trouble
        waiting = self.waiting.pop(actor, None)
        try:
            found = self.ledger(actor, opted_in).try_acquire(REQUEST.request_hash, waiting=waiting)
        except UnknownOutcomeError:
            assert not opted_in
            assert self.run_of(actor) in self.doubtful_runs
            return
        if isinstance(found, Waiting):
            assert self.claims, "there is nobody to wait for"
            self.waiting[actor] = found
        elif isinstance(found, Claim):
            assert not self.recorded
            assert opted_in or self.run_of(actor) not in self.doubtful_runs
            self.claims[actor] = found
            self.proven[found.token] = self.now
        else:
            assert self.recorded

    @rule(actor=ACTORS, trouble=TROUBLES)
    def send(self, actor: int, trouble: str | None) -> None:
        """A holder proves its lease and sends: nobody else may be at it."""
        claim = self.claims.get(actor)
        if claim is None:
            return
        self.store.trouble = trouble
        try:
            claim.before_sending()
        except StoreError:
            return
        if self.now - self.proven[claim.token] > leases.PROVE_AFTER * TTL:
            self.proven[claim.token] = self.now
        assert self.sent - {claim.token} <= self.excused
        self.sent.add(claim.token)

    @rule(actor=ACTORS, trouble=TROUBLES)
    def renew(self, actor: int, trouble: str | None) -> None:
        """The renewing thread has its turn."""
        if actor in self.claims:
            self.store.trouble = trouble
            self.claims[actor].renew()
            self.proven[self.claims[actor].token] = self.now

    @rule(actor=ACTORS, trouble=TROUBLES)
    def answer(self, actor: int, trouble: str | None) -> None:
        """The API answers, however late, and that is recorded."""
        claim = self.claims.get(actor)
        if claim is None or claim.token not in self.sent:
            return
        image = stored(self.store, claim.token.encode())
        self.store.trouble = trouble
        record = claim.record(generation_of(REQUEST, image))
        assert not self.store.missing(record.generation.images)
        self.recorded = True
        del self.claims[actor]

    @rule(actor=ACTORS, trouble=TROUBLES)
    def fail_for_free(self, actor: int, trouble: str | None) -> None:
        """The request is refused, or was never sent: the claim is given back."""
        claim = self.claims.pop(actor, None)
        if claim is not None:
            self.store.trouble = trouble
            claim.release()
            self.sent.discard(claim.token)

    @rule(actor=ACTORS, trouble=TROUBLES)
    def time_out(self, actor: int, trouble: str | None) -> None:
        """It is unknown what became of the request."""
        claim = self.claims.get(actor)
        if claim is not None and claim.token in self.sent:
            self.store.trouble = trouble
            claim.mark_unknown("read timed out")
            self.excused.add(claim.token)
            self.doubtful_runs.add(self.run_of(actor))
            del self.claims[actor]

    @rule(actor=ACTORS)
    def crash(self, actor: int) -> None:
        """The holder dies, as every process of this machine can tell."""
        claim = self.claims.pop(actor, None)
        if claim is not None:
            self.excused.add(claim.token)
            self.doubtful_runs.add(self.run_of(actor))

    @rule(actor=ACTORS)
    def begin_a_new_run(self, actor: int) -> None:
        if actor not in self.claims:
            self.runs[actor] += 1
            self.waiting.pop(actor, None)

    @rule(seconds=st.sampled_from([1.0, 31.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for actor, claim in self.claims.items():
            if self.now - self.proven[claim.token] >= TTL:
                self.excused.add(claim.token)
                self.doubtful_runs.add(self.run_of(actor))

    @precondition(lambda self: self.recorded)
    @invariant()
    def every_payment_is_named_once(self) -> None:
        """Each send is the answer, or paid in vain, or perhaps paid, or still under way; and nothing else is."""
        record = Ledger(self.store, API, "reader").look_up(REQUEST.request_hash)
        assert record is not None, "what was recorded stays recorded"
        answered = self.store.read_bytes(record.generation.images[0].uri).decode()
        named = [answered, *(note.token for note in (*record.maybe_paid, *record.also_paid))]
        assert len(named) == len(set(named))
        under_way = {claim.token for claim in self.claims.values()}
        assert self.sent <= {*named, *under_way}
        assert set(named) <= self.sent | self.excused | under_way

    def run_of(self, actor: int) -> str:
        return f"run-{actor}-{self.runs[actor]}"

    def ledger(self, actor: int, opted_in: bool) -> Ledger:
        run_id = self.run_of(actor)
        return Ledger(
            self.store, API, run_id, ttl=TTL, retry_unknown_outcome=opted_in, clock=lambda: self.now
        )


def test_no_interleaving_pays_without_a_reason_and_a_name() -> None:
    """Nobody sends while another's lease stands, a record once made stays, and each payment is named in it."""
    run_state_machine_as_test(
        Holders, settings=settings(max_examples=80, stateful_step_count=25, deadline=None)
    )
