"""What the router takes a worker's load for: the latest that it said, and what is on its way to it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sun.messages import Load, Stats
from sun.router.policy import Pack
from sun.router.pool import Pool

FULL, BUDGET = 3, 50
ROOMY = 10**9
WORKERS = ["decode_0", "decode_1"]


def pool(full: int = FULL) -> Pool:
    return Pool(None, WORKERS, Pack(full), lost=lambda worker: None, found=lambda worker: None)


class Reports(RuleBasedStateMachine):
    """Sequences come and go at workers whose reports are delivered in any order; requests take their time to a worker and back."""

    def __init__(self):
        super().__init__()
        self.it = pool()
        self.clock = 0
        self.here = {worker: [] for worker in WORKERS}
        """Of each worker, its sequences: tokens, slots."""
        self.going, self.coming, self.events = [], [], []

    def load(self, worker: str) -> Load:
        self.clock += 1
        here = self.here[worker]
        return Load(sum(tokens for tokens, _ in here), len(here), BUDGET - sum(need for _, need in here), self.clock)

    @rule(tokens=st.integers(1, 9), more=st.integers(0, 9))
    def pick(self, tokens, more):
        worker = self.it.pick("a", tokens, tokens + more, set())
        self.going.append((worker, tokens, tokens + more))

    @precondition(lambda self: self.going)
    @rule(data=st.data(), takes=st.booleans())
    def admit(self, data, takes):
        one = self.going.pop(data.draw(st.integers(0, len(self.going) - 1)))
        if takes:
            self.here[one[0]].append(one[1:])
        self.coming.append((one, self.load(one[0]) if takes else None))

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def acknowledge(self, data):
        one, load = self.coming.pop(data.draw(st.integers(0, len(self.coming) - 1)))
        if load is not None:
            self.it.report(one[0], load)
        self.it.arrived(*one)

    @rule(worker=st.sampled_from(WORKERS), leave=st.booleans())
    def step(self, worker, leave):
        if leave and self.here[worker]:
            self.here[worker].pop(0)
        self.events.append((worker, self.load(worker)))

    @precondition(lambda self: self.events)
    @rule(data=st.data())
    def hear(self, data):
        self.it.report(*self.events.pop(data.draw(st.integers(0, len(self.events) - 1))))

    @invariant()
    def no_batch_is_overfilled_while_another_has_room(self):
        both = {worker: len(self.here[worker]) + sum(one[0] == worker for one in self.going) for worker in WORKERS}
        if all(sum(need for _, need in here) < BUDGET // 2 for here in self.here.values()) and both["decode_1"] < FULL:
            assert both["decode_0"] <= FULL or self.it.loads["decode_1"].sequences >= FULL

    def teardown(self):
        """When all is said and nothing is under way, the pool's loads are the workers'."""
        while self.going:
            one = self.going.pop()
            self.coming.append((one, None))
        for one, load in self.coming:
            if load is not None:
                self.it.report(one[0], load)
            self.it.arrived(*one)
        for worker in WORKERS:
            self.it.report(worker, self.load(worker))
        for worker, load in self.events:
            self.it.report(worker, load)
        for worker, load in self.it.loads.items():
            now = self.load(worker)
            assert (load.tokens, load.sequences, load.room) == (now.tokens, now.sequences, now.room)


Reports.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReports = Reports.TestCase


def test_a_report_from_before_an_admission_does_not_hide_it():
    it = pool(full=2)
    assert [it.pick("a", 5, 8, set()) for _ in range(2)] == ["decode_0"] * 2
    it.report("decode_0", Load(0, 0, ROOMY, at=1))  # a step that ended before either came
    assert it.loads["decode_0"] == Load(10, 2, ROOMY - 16, 1)
    assert it.pick("a", 5, 8, set()) == "decode_1"


def test_a_report_that_comes_late_is_passed_over():
    it = pool()
    it.report("decode_0", Load(9, 3, ROOMY, at=7))
    it.report("decode_0", Load(0, 0, ROOMY, at=6))
    assert it.loads["decode_0"].sequences == 3


def test_a_heartbeat_tells_of_what_no_event_does():
    it = pool()
    it.report("decode_0", Load(0, 0, 8, at=5))  # an aborted sequence's slot was still taken
    it._find("decode_0", Stats(running=0, waiting=0, load=Load(0, 0, 50, 6), free_tokens=50, budget_tokens=50, step=1, steps=[]))
    assert it.loads["decode_0"].room == 50
    it._find("decode_0", Stats(running=0, waiting=0, load=Load(9, 1, 10, 4), free_tokens=10, budget_tokens=50, step=1, steps=[]))
    assert it.loads["decode_0"].room == 50, "but not of what is older than the last"


def test_a_sequence_goes_past_a_worker_without_room_for_it():
    it = pool()
    it.report("decode_0", Load(9, 1, 10, at=1))
    assert [it.pick("a", 5, 8, set()), it.pick("a", 5, 8, set()), it.pick("a", 1, 2, set())] == ["decode_0", "decode_1", "decode_0"]
