"""Prefill and decode workers as simpy processes. Time is in ms."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import simpy

from sun.decode.kv_pool import KVPool, Slot
from sun.decode.scheduler import Scheduler
from sun.messages import Load
from sun.model.manifest import Geometry, Rope
from sun.prefill.engine import plan
from sun_perf.simulation.costs import PrefillTime, Prompt, StepTime
from sun_perf.simulation.leap import Leap
from sun_perf.simulation.traffic import Request

NO_GEOMETRY = Geometry(layers=0, kv_heads=0, head_dim=0, rope=Rope("none", []))


@dataclass(eq=False)
class Sequence:
    """A request on its way, with what `sun.decode.scheduler.Scheduler` needs to know of a sequence. Times in ms, NaN until they come."""

    request: Request
    generated: int = 0
    slot: Slot | None = None
    prefilled: float = math.nan
    first: float = math.nan
    last: float = math.nan

    @property
    def need(self) -> int:
        """Slot size in tokens."""
        return self.request.prompt + self.request.max_tokens - 1

    @property
    def left(self) -> int:
        """Tokens that it will generate yet; nobody in the fleet knows."""
        return self.request.output - self.generated

    @property
    def outstanding(self) -> int:
        """Tokens that it may generate yet, which is what workers report."""
        return self.request.max_tokens - self.generated

    @property
    def context(self) -> int:
        """Tokens that its next step attends to."""
        return self.request.prompt + self.generated


class PrefillWorker:
    """Runs passes as `sun.prefill.engine.PrefillEngine` plans them; calls done(sequence) when a prompt's KV is published."""

    def __init__(self, env: simpy.Environment, name: str, times: PrefillTime, budget: int, done: Callable[[Sequence], None]):
        self.env, self.name, self.times, self.budget, self.done = env, name, times, budget, done
        self.busy = 0.0
        self._jobs: deque[Prompt] = deque()
        self._sequences: dict[Prompt, Sequence] = {}
        self._wake = env.event()
        env.process(self._run())

    @property
    def load(self) -> Load:
        """What is in line."""
        return Load(sum(job.left for job in self._jobs), len(self._jobs))

    def submit(self, sequence: Sequence) -> None:
        """Queue all but the last of a prompt's tokens."""
        job = Prompt(sequence.request.prompt - 1)
        self._jobs.append(job)
        self._sequences[job] = sequence
        _trigger(self._wake)

    def _run(self) -> Iterator[simpy.Event]:
        while True:
            if not self._jobs:
                self._wake = self.env.event()
                yield self._wake
            chunks = plan(self._jobs, self.budget)
            work = [(chunk.job.done, chunk.size) for chunk in chunks if chunk.size]
            if work:
                ms = self.times.ms(work)
                self.busy += ms
                yield self.env.timeout(ms)
            for chunk in chunks:
                chunk.job.advance(chunk.size)
                if not chunk.job.left:
                    self._jobs.remove(chunk.job)
                    self.done(self._sequences.pop(chunk.job))


class DecodeWorker:
    """Continuous batching under the engine's own `Scheduler`; calls done(sequence) with each one's last token.

    As in `sun.decode.engine.DecodeEngine`, one process pulls KV and one runs the steps. All sequences of a batch advance together, so
    the steps until the first of them ends, or until one whose KV has come can join, are one event: a leap.
    """

    def __init__(self, env: simpy.Environment, name: str, times: StepTime, transfer: PrefillTime, kv_tokens: int, max_batch: int,
                 done: Callable[[Sequence], None]):
        self.env, self.name, self.times, self.transfer, self.done = env, name, times, transfer, done
        # The pool's books are wanted, not its memory: KV of no layers takes none.
        self.scheduler = Scheduler(KVPool(NO_GEOMETRY, kv_tokens), max_batch)
        self.busy = 0.0
        self.batches: Counter[int] = Counter()
        self._outstanding = 0
        self._leap: Leap | None = None
        self._may_join = False
        self._arrived: deque[Sequence] = deque()
        self._room, self._work = env.event(), env.event()
        env.process(self._pulling())
        self._stepping = env.process(self._steps())

    @property
    def load(self) -> Load:
        """As its latest step reported."""
        leap, scheduler = self._leap, self.scheduler
        return Load(self._outstanding - (leap.batch * leap.whole_steps(self.env.now) if leap else 0), len(scheduler.sequences), scheduler.room)

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence whose KV is published."""
        self._outstanding += sequence.outstanding
        self.scheduler.add(sequence)
        _trigger(self._room)

    def _pulling(self) -> Iterator[simpy.Event]:
        while True:
            sequence = self.scheduler.place()
            if sequence is None:
                self._room = self.env.event()
                yield self._room
                continue
            yield self.env.timeout(self.transfer.pull(sequence.request.prompt - 1))
            self._arrived.append(sequence)
            if self._may_join:
                self._may_join = False
                self._stepping.interrupt()
            else:
                _trigger(self._work)

    def _steps(self) -> Iterator[simpy.Event]:
        while True:
            while self._arrived:
                self.scheduler.start(self._arrived.popleft())
            running = self.scheduler.running
            if not running:
                self._work = self.env.event()
                yield self._work
                continue
            leap = self._leap = Leap(self.times, self.env.now, len(running), sum(s.context for s in running), min(s.left for s in running))
            self._may_join = True
            try:
                yield self.env.timeout(leap.end(leap.steps) - self.env.now)
            except simpy.Interrupt:
                leap.steps = leap.started_steps(self.env.now)
                yield self.env.timeout(max(0.0, leap.end(leap.steps) - self.env.now))
            self._may_join, self._leap = False, None
            if leap.steps:
                self._advance(leap)

    def _advance(self, leap: Leap) -> None:
        self.busy += leap.end(leap.steps) - leap.began
        self.batches[leap.batch] += leap.steps
        self._outstanding -= leap.batch * leap.steps
        for sequence in list(self.scheduler.running):
            if not sequence.generated:
                sequence.first = leap.end(1)
            sequence.generated += leap.steps
            if not sequence.left:
                sequence.last = self.env.now
                self._outstanding -= sequence.outstanding
                self.scheduler.remove(sequence)
                self.done(sequence)
                _trigger(self._room)


def _trigger(event: simpy.Event) -> None:
    if not event.triggered:
        event.succeed()
