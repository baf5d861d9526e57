"""The scheduler under any sequence of events: first come first served, slots neither shared nor lost."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sun.decode.kv_pool import KVPool
from sun.decode.params import SamplingParams
from sun.decode.scheduler import Scheduler
from sun.decode.sequence import Sequence
from sun.messages import Admit, Load

from .test_ticket import GEOMETRY, TICKET

BUDGET, MAX_BATCH = 30, 4
names = itertools.count()


def sequence(prompt: int = 1, max_tokens: int = 1) -> Sequence:
    admit = Admit(id=str(next(names)), router="r", task="a", prompt=[0] * prompt, params=SamplingParams(max_tokens=max_tokens))
    return Sequence(admit, TICKET, [], frozenset())


def scheduler() -> Scheduler:
    return Scheduler(KVPool(GEOMETRY, BUDGET), MAX_BATCH)


class AnyEvents(RuleBasedStateMachine):
    """Adds, places, starts and removes in any order, against a list of who came when."""

    def __init__(self):
        super().__init__()
        self.it = scheduler()
        self.line: list[Sequence] = []

    @rule(prompt=st.integers(1, 15), max_tokens=st.integers(1, 15))
    def add(self, prompt, max_tokens):
        self.line.append(sequence(prompt, max_tokens))
        self.it.add(self.line[-1])

    @rule()
    def place(self):
        active = len(self.it.placed) + len(self.it.running)
        fits = bool(self.line) and active < MAX_BATCH and any(gap.size >= self.line[0].need for gap in self.it.pool._slots.gaps)
        placed = self.it.place()
        assert placed is (self.line.pop(0) if fits else None), "not the first in line"
        if placed:
            assert placed.slot.size == placed.need and placed in self.it.placed

    @precondition(lambda self: self.it.placed)
    @rule(data=st.data())
    def start(self, data):
        one = data.draw(st.sampled_from(self.it.placed))
        self.it.start(one)
        assert one in self.it.running and one.slot is not None

    @precondition(lambda self: self.it.sequences)
    @rule(data=st.data())
    def remove(self, data):
        one = data.draw(st.sampled_from(self.it.sequences))
        self.it.remove(one)
        if one in self.line:
            self.line.remove(one)
        assert one not in self.it.sequences and one.slot is None

    @invariant()
    def books_are_right(self):
        self.it.check_integrity()
        assert list(self.it.waiting) == self.line
        assert len(self.it.placed) + len(self.it.running) <= MAX_BATCH
        load = self.it.load()
        assert (load.tokens, load.sequences) == (sum(s.outstanding for s in self.it.sequences), len(self.it.sequences))
        assert load.room == BUDGET - sum(s.need for s in self.it.sequences), "what waits is counted as if it had its slot"

    def teardown(self):
        for one in self.it.sequences:
            self.it.remove(one)
        self.it.check_integrity()
        assert self.it.pool.free_tokens == BUDGET and self.it.pool.take(BUDGET) is not None


AnyEvents.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAnyEvents = AnyEvents.TestCase


def test_nobody_overtakes_a_first_in_line_that_does_not_fit_yet():
    it = scheduler()
    running, long, short = sequence(10, 1), sequence(25, 1), sequence(1, 1)
    for one in (running, long, short):
        it.add(one)
    assert it.place() is running and it.place() is None and list(it.waiting) == [long, short]
    it.remove(running)
    assert it.place() is long and it.place() is short


def test_a_slot_holds_the_prompt_and_all_but_the_last_token():
    assert sequence(5, 3).need == 7


def test_sequences_that_were_aborted_are_no_load():
    it = scheduler()
    one, other = sequence(1, 5), sequence(1, 7)
    it.add(one)
    it.add(other)
    assert it.load().tokens == 12
    one.aborted = True
    assert it.load().tokens == 7


def test_those_that_leave_are_no_load_and_their_slots_are_free():
    it = scheduler()
    one, other = sequence(2, 5), sequence(1, 7)
    for each in (one, other):
        it.add(each)
        it.start(it.place())
    assert it.load(3, [one]) == Load(7, 1, BUDGET - other.need, 3)


def test_load_falls_with_every_token():
    it = scheduler()
    one = sequence(1, 5)
    it.add(one)
    one.generated += [3, 4]
    assert it.load().tokens == 3 and one.position == 2 and one.last == 4
