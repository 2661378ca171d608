"""The ledger through arbitrary interleavings: holders that crash, stall or come late, and a store that fails.

Three actors ask for one request, step by step, on a clock that the test moves. A holder whose claim nobody chooses to
renew is a stalled one, or one cut off.
"""

from __future__ import annotations

import math
import tempfile
import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from prefect_ttapi.cli.findings import Finding, Kind
from prefect_ttapi.cli.verify import repair
from prefect_ttapi.errors import StoreError, UnknownOutcomeError
from prefect_ttapi.ledger import leases
from prefect_ttapi.ledger.claims import Claim
from prefect_ttapi.ledger.documents import (
    Answer,
    Document,
    Kept,
    Record,
    State,
    decode,
    facts_of_generation,
)
from prefect_ttapi.ledger.ledger import Ledger, Waiting
from prefect_ttapi.ledger.transitions import unread
from prefect_ttapi.storage.layout import image_key
from prefect_ttapi.storage.store import ImageStore
from tests.support.generations import API, fresh_image, generation_of, request_of, stored
from tests.support.ledgers import unreadable
from tests.support.stage import WRITES, Lane, StagedStore, halt

TTL = 60.0
REQUEST = request_of()
HASH = REQUEST.request_hash
ACTORS = st.sampled_from([0, 1, 2])

#: Where an actor that goes on without trouble comes to a stop: where it waits, or may be held up before it sends.
STOPS = {"goes on": {"wait", "prove", "send", "api", "reading"}, "goes far": {"wait", "api", "reading"}}
GOING_ON = [*STOPS] * 5

#: What comes of a step without trouble; what one version can't read, the next one hardly can.
TROUBLELESS = {"api": "answers", "reading": "fails"}

#: What may happen besides: death, renewals, seconds that pass.
ELSEWHERE = ["dies", "vanishes", "renewals", "1", "31", "61", "a late write", "a loss", "a repair"]

#: What may become of a step.
FATES = {
    "read": ["works", "works", "fails"],
    "look": ["works", "fails"],
    "put": ["works", "fails"],
    "write": list(WRITES),
    "api": ["answers", "refuses", "says nothing", "wants it again", *3 * ["can't be understood"]],
    "reading": [*4 * ["works"], "fails"],
}


@dataclass(frozen=True)
class Run:
    """A flow run; records older than `not_before` don't count for one that refreshes."""

    name: str
    not_before: datetime | None = None
    opted_in: bool = False
    on_dead_claim: str = "retry"


RUNS = {
    "a new one": Run(""),
    "one that refreshes": Run(""),
    "one that opted in": Run("", opted_in=True),
    "a wary one": Run("", on_dead_claim="unknown"),
    "one that refreshes and opted in": Run("", opted_in=True),
}


@dataclass
class Actor:
    """A process, which asks on behalf of a run, and the thread that renews its claim."""

    run: Run
    lane: Lane | None = None
    renewal: Lane | None = None
    claim: Claim | None = None


@dataclass
class Token:
    """What is true of one claim, whatever the ledger says.

    Attributes:
        written: when the store last wrote the claim.
        sends: how often its holder sent, refusals apart.
        excused: its holder died, could not renew for a TTL, or doesn't know what became of it.
        recorded: the store has its answer.
        overruled: a late finisher recorded another answer, which its holder needn't know.
        settled: its holder has heard that its answer is recorded.
        superseded: its answer was the record, until a refresh or a loss.
        in_vain: its answer came second, and the first is the record no more.
    """

    run: Run
    written: float
    sends: int = 0
    excused: bool = False
    recorded: bool = False
    overruled: bool = False
    settled: bool = False
    superseded: bool = False
    in_vain: bool = False
    holder: threading.Thread | None = field(default=None, repr=False)


class Holders(RuleBasedStateMachine):
    """What the actors do, beside a plain account of what must be true."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")  # noqa: S108 - a folder whose fsync costs nothing
        self.folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
        self.real = ImageStore(url=self.folder.name)
        self.real.check_once()
        self.store = StagedStore(self.real, self.check_write)
        self.now = 1000.0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(leases, "clock", lambda: self.now)
        self.patch.setattr(leases, "RENEW_AFTER", math.inf)  # but when an actor is told to
        self.runs = 3
        self.rescued: Answer | None = None  # paid for, and not stored yet; perhaps one that nobody can read
        self.actors = [Actor(Run(f"run-{number}")) for number in range(3)]
        self.gone: list[Actor] = []  # on machines that nobody hears of any more
        self.tokens: dict[str, Token] = {}
        self.run_of: dict[threading.Thread, Run] = {}
        self.doubtful: set[str] = set()  # runs that may have sent without knowing what became of it

    def teardown(self) -> None:
        try:
            for actor in [*self.actors, *self.gone]:
                self.end(actor)
            self.check_that_nobody_is_blocked()
        finally:
            self.patch.undo()
            self.folder.cleanup()

    # what happens

    @initialize(sealed=st.booleans())
    def find(self, sealed: bool) -> None:
        """There is nothing, or an answer that nobody could read."""
        actor = self.actors[0]
        if sealed:
            self.begin(actor)
        while actor.lane is not None:
            actor.lane.proceed("can't be understood" if actor.lane.at == "api" else "works")
            self.look_after(actor)

    @rule(number=ACTORS, data=st.data())
    def act(self, number: int, data: st.DataObject) -> None:
        """An actor takes one step with any fate, or some without trouble; or something happens elsewhere."""
        actor = self.actors[number]
        if actor.lane is None:
            self.ask(actor, data)
        lane = actor.renewal or actor.lane
        fate = data.draw(st.sampled_from([*GOING_ON, *FATES.get(lane.at, []), *ELSEWHERE]), lane.at)
        if fate in STOPS:
            self.go_on(actor, STOPS[fate])
        elif fate == "dies":  # as every process of its machine can tell
            self.end(actor)
        elif fate == "vanishes":  # and nobody can tell
            self.gone.append(actor)
            self.actors[number] = Actor(actor.run)
        elif fate == "renewals":
            self.renew_all()
        elif fate == "a late write":
            self.store.bring_a_late_write()
        elif fate == "a loss":
            self.lose_images()
        elif fate == "a repair":
            self.give_up_answers()
        elif fate.isdigit():
            self.pass_time(float(fate))
        else:
            lane.proceed(fate)
            self.look_after(actor)

    def go_on(self, actor: Actor, stops: set[str]) -> None:
        while (lane := actor.renewal or actor.lane) is not None:
            lane.proceed(TROUBLELESS.get(lane.at, "works"))
            self.look_after(actor)
            if lane.at in stops:
                break

    def renew_all(self) -> None:
        """The renewing threads have their turn."""
        for actor in self.actors:
            if actor.claim is not None and actor.renewal is None:
                actor.renewal = Lane(actor.claim.renew).begin()
                self.look_after(actor)

    def lose_images(self) -> None:
        """Somebody tidies up the store."""
        answer = self.answer()
        for image in answer.generation["images"] if answer else ():
            self.real.objects.delete(image_key(image["sha256"], image["media_type"]))
            for token in self.tokens.values():
                token.excused = True

    def give_up_answers(self) -> None:
        """Somebody says that what can't be read may be paid for anew."""
        repair(self.real, Finding(Kind.KEPT, "", "", records=(self.key(),)))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for token in self.tokens.values():
            if not token.settled and self.now - token.written >= TTL:
                self.excuse(token)

    # what an actor does

    def pay(self, actor: Actor, run: Run) -> None:
        """Ask, wait, and where there is a claim, send and record, or record what was answered before."""
        ledger = Ledger(
            self.store,
            API,
            run.name,
            ttl=TTL,
            on_dead_claim=run.on_dead_claim,
            retry_unknown_outcome=run.opted_in,
        )
        has_answer = self.rescued is not None
        try:
            while True:
                found = self.wait(ledger, run, has_answer)
                if isinstance(found, Record):
                    assert found.generation.request == REQUEST
                    return
                actor.claim = found
                with found as claim:
                    answer = self.rescued if has_answer else None
                    if not has_answer:
                        if self.read_again(ledger, claim):
                            self.send(claim)
                        return
                    has_answer = False
                    if answer is None or is_too_old(answer, run):
                        continue
                    if not isinstance(answer, Kept):
                        self.keep(claim, answer)
                        return
                    self.keep_unread(claim, answer)
        except UnknownOutcomeError:
            assert run.name in self.doubtful or run.on_dead_claim == "unknown"
            assert not run.opted_in
        except StoreError:
            pass  # told to the caller

    def wait(self, ledger: Ledger, run: Run, has_answer: bool) -> Record | Claim:
        waiting = None
        while True:
            asked = self.now
            found = ledger.try_acquire(HASH, run.not_before, waiting, has_answer=has_answer)
            if not isinstance(found, Waiting):
                return found
            if waiting is not None and waiting.claimed.tag == found.claimed.tag:
                assert asked - waiting.since < TTL, "a claim blocks for no longer than its TTL"
            waiting = found
            halt("wait")

    def send(self, claim: Claim) -> None:
        token = self.tokens[claim.token]
        outcome = "wants it again"
        while outcome == "wants it again":
            halt("prove")
            claim.before_sending()
            self.check_proof(claim.token)
            halt("send")
            self.check_send(claim.token)
            token.sends += 1
            outcome = halt("api")
            if outcome in ("refuses", "wants it again"):
                token.sends -= 1
        if outcome == "refuses":
            claim.release()
        elif outcome == "can't be understood":
            self.excuse(token)
            self.keep_unread(
                claim, unreadable(claim, REQUEST, whole=len(self.tokens) % 3 > 0, when=self.wall())
            )
        elif outcome == "says nothing":
            self.excuse(token)
            claim.mark_unknown("read timed out")
        else:
            image = self.real.reference(fresh_image(claim.token.encode()))
            self.keep(claim, claim.answer(generation_of(REQUEST, image, created_at=self.wall())))

    def read_again(self, ledger: Ledger, claim: Claim) -> bool:
        """Read what nobody could read before; return whether the request is to be sent all the same."""
        for kept in claim.unread:
            if halt("reading") == "works":
                image = self.real.reference(fresh_image(kept.token.encode()))
                made = generation_of(REQUEST, image, created_at=kept.when)
                facts = {"run_id": kept.run_id, "generation": facts_of_generation(made)}
                self.keep(claim, Answer(token=kept.token, **facts))
                return False
        return not ledger.keeps_from_sending(claim)

    def keep_unread(self, claim: Claim, kept: Kept) -> None:
        """Note an answer that nobody can read; where that can't be, others of the machine find it."""
        try:
            noted = claim.keep(kept)
        except StoreError:
            noted = False
            if kept.token == claim.token:
                claim.mark_unknown("paid for, not stored")
        self.rescued = None if noted else self.rescued or kept

    def keep(self, claim: Claim, answer: Answer) -> None:
        """Store the images and record the answer; try again, with the answer where others of the machine find it."""
        for attempt in range(3):
            try:
                stored(self.store, answer.token.encode())
                record = claim.record_answer(answer)
            except StoreError:
                self.rescued = answer
                if attempt == 2:
                    if answer.token == claim.token:
                        self.excuse(self.tokens[claim.token])
                        claim.mark_unknown("paid for, not stored")
                    raise
            else:
                self.tokens[answer.token].settled = True
                self.rescued = None if self.rescued is answer else self.rescued
                assert record.generation.request == REQUEST
                return

    def ask(self, actor: Actor, data: st.DataObject) -> None:
        """An idle actor asks, on behalf of the same run as before or another one."""
        kind = data.draw(st.sampled_from(["the same", "somebody's", *RUNS]), "run")
        if kind == "somebody's":
            actor.run = data.draw(st.sampled_from([other.run for other in self.actors]))
        elif kind != "the same":
            self.runs += 1
            not_before = self.wall() if "refreshes" in kind else None
            actor.run = replace(RUNS[kind], name=f"run-{self.runs}", not_before=not_before)
        self.begin(actor)

    def begin(self, actor: Actor) -> None:
        lane = actor.lane = Lane(partial(self.pay, actor, actor.run))
        self.run_of[lane] = actor.run
        lane.begin()

    # what must be true

    def check_proof(self, name: str) -> None:
        """Who is allowed to send wrote its claim less than a TTL ago, and only a late answer may have replaced it."""
        token, standing = self.tokens[name], self.standing()
        assert self.now - token.written < TTL
        assert standing.token == name or token.overruled

    def check_send(self, name: str) -> None:
        """Whoever else paid has recorded it, or has an excuse; a run sends once unless it opted in."""
        token = self.tokens[name]
        kept = unread(self.standing(), token.run.not_before, token.run.name)
        assert token.run.opted_in or not any(each.whole for each in kept), "there is an answer to be read"
        others = [other for other in self.tokens.values() if other is not token and other.sends]
        if not token.excused and not token.overruled:
            assert all(other.excused or other.recorded or other.overruled for other in others)
        if not token.run.opted_in:
            assert not any(
                other.run == token.run and not (other.superseded or other.in_vain) for other in others
            )

    def check_write(self, by: threading.Thread, before: bytes | None, after: bytes) -> None:
        """No write loses a name, drops a claim that stands, or gives up an answer that counts."""
        new = decode(after, HASH, API)
        old = decode(before, HASH, API) if before else None
        writer = self.account(new, by)
        if new.state is State.GENERATED and (old is None or old.answer != new.answer):
            assert self.is_whole(new.answer)
        if new.answer is not None:
            self.tokens[new.answer.token].recorded = True
        if old is None:
            return
        if {kept.token for kept in old.kept} - {kept.token for kept in new.kept}:
            assert new.state is State.GENERATED
            assert (old.answer, old.also_paid) != (new.answer, new.also_paid), "an answer in hand is given up"
        if old.answer is not None and (new.answer is None or new.answer.token != old.answer.token):
            beaten = old.state is State.CLAIMED and old.answer.token in named(
                new
            )  # a refresh was, by a late answer
            assert beaten or self.may_replace(old.answer, writer.run)
            assert new.state is State.GENERATED or not self.is_whole(old.answer), (
                "a refresh keeps the old one"
            )
            self.tokens[old.answer.token].superseded = True
            for note in old.also_paid:
                self.tokens[note.token].in_vain = True
        if old.state is State.CLAIMED and old.token != new.token:
            assert old.token in named(new)
            assert self.tokens[old.token].excused or new.state is State.GENERATED
            self.tokens[old.token].overruled = new.state is State.GENERATED
            self.doubtful.add(self.tokens[old.token].run.name)
        paid = {name for name, token in self.tokens.items() if token.sends and not token.superseded}
        assert named(old) & paid <= named(new) | {new.token}
        if new.state is State.CLAIMED and old.state is not State.CLAIMED and old.answer is not None:
            assert self.may_replace(old.answer, writer.run), "there is a record, and it is paid for again"

    @invariant()
    def every_payment_is_named(self) -> None:
        """Each payment is the record's, or noted there, or its holder is still at it; nothing is named twice."""
        found = self.real.read_document(self.key())
        document = decode(found[0], HASH, API) if found else None
        known = named(document) if document else set()
        if document is not None:
            notes = [note.token for note in (*document.maybe_paid, *document.also_paid)]
            assert len(notes) == len(set(notes))
            assert document.answer is None or document.answer.token not in notes
        for name, token in self.tokens.items():
            if token.sends and not token.superseded:
                assert name in known or token.holder is not None, "a payment without a name"

    def check_that_nobody_is_blocked(self) -> None:
        """A new run gets the record or a claim within a TTL."""
        ledger = Ledger(self.real, API, "last", ttl=TTL)
        found = ledger.try_acquire(HASH)
        if isinstance(found, Waiting):
            self.now += TTL
            found = ledger.try_acquire(HASH, waiting=found)
        assert isinstance(found, Record) == (self.answer() is not None and self.is_whole(self.answer()))
        assert isinstance(found, Record | Claim)

    # the account

    def account(self, new: Document, by: threading.Thread) -> Token:
        """The writing claim's place in the account, from its first write on."""
        if new.token not in self.tokens:
            holder = by if by.is_alive() else None
            self.tokens[new.token] = Token(self.run_of[by], self.now, holder=holder, excused=holder is None)
        token = self.tokens[new.token]
        if new.state is State.CLAIMED:
            token.written = self.now
        return token

    def look_after(self, actor: Actor) -> None:
        """What has ended is over."""
        if actor.renewal is not None and actor.renewal.at is None:
            actor.renewal = None
        if actor.lane is not None and actor.lane.at is None:
            self.end(actor)

    def end(self, actor: Actor) -> None:
        for lane in (actor.renewal, actor.lane):
            if lane is not None:
                lane.die()
        for token in self.tokens.values():
            if token.holder is actor.lane and token.holder is not None:
                token.holder = None
                if not token.settled:
                    self.excuse(token)
        actor.lane = actor.renewal = actor.claim = None

    def excuse(self, token: Token) -> None:
        token.excused = True
        self.doubtful.add(token.run.name)

    def may_replace(self, answer: Answer, run: Run) -> bool:
        """Whether an answer does not count for a run."""
        return is_too_old(answer, run) or not self.is_whole(answer)

    def is_whole(self, answer: Answer) -> bool:
        images = answer.generation["images"]
        keys = [image_key(image["sha256"], image["media_type"]) for image in images]
        return all(
            self.real.size(key) == image["size_bytes"] for key, image in zip(keys, images, strict=True)
        )

    def standing(self) -> Document:
        return decode(self.real.read_document(self.key())[0], HASH, API)

    def answer(self) -> Answer | None:
        found = self.real.read_document(self.key())
        return decode(found[0], HASH, API).answer if found else None

    def key(self) -> str:
        return Ledger(self.real, API, "reader").documents.key(HASH)

    def wall(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.now)


def is_too_old(answer: Answer, run: Run) -> bool:
    """For a run that refreshes."""
    made = datetime.fromisoformat(answer.generation["created_at"])
    made = answer.when if isinstance(answer, Kept) else made
    return run.not_before is not None and answer.run_id != run.name and made < run.not_before


def named(document: Document) -> set[str]:
    """The claims that a document names: its own, that of its answer, and those of all other payments."""
    notes = {note.token for note in (*document.maybe_paid, *document.also_paid)}
    own = {document.token} if document.state is State.CLAIMED else set()
    return notes | own | ({document.answer.token} if document.answer else set())


@pytest.mark.parametrize(
    ("examples", "steps"), [(30, 40), pytest.param(200, 60, marks=pytest.mark.integration)]
)
def test_no_interleaving_pays_without_a_reason_and_a_name(examples: int, steps: int) -> None:
    """Nobody sends while another's lease stands, a record once made stays, and each payment is named in it."""
    run_state_machine_as_test(
        Holders,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
