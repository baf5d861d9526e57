"""Which sequences run next: waiting -> placed (its KV is being pulled) -> running -> gone. No threads, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from sun.decode.kv_pool import KVPool
from sun.decode.sequence import Sequence
from sun.messages import Load


class Scheduler:
    """Continuous batching, first come first served, within the KV pool's tokens and ``max_batch`` sequences a step.

    The first in line waits until a slot is free and nobody overtakes it, so that a long one cannot starve.
    """

    def __init__(self, pool: KVPool, max_batch: int):
        self.pool, self.max_batch = pool, max_batch
        self.waiting: deque[Sequence] = deque()
        self.placed: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences it knows."""
        return [*self.waiting, *self.placed, *self.running]

    @property
    def room(self) -> int:
        """Tokens of KV that are free and that none waits for."""
        return self.pool.free_tokens - sum(s.need for s in self.waiting)

    def load(self, at: int = 0, without: Iterable[Sequence] = ()) -> Load:
        """What there is to do, less what is to be dropped and those that leave now (``without``, which run)."""
        left = [s for s in self.sequences if not s.aborted and s not in without]
        return Load(sum(s.outstanding for s in left), len(left), self.room + sum(s.slot.size for s in without), at)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line."""
        self.waiting.append(sequence)

    def place(self) -> Sequence | None:
        """Give the first in line its slot, if the batch and the pool have room; its KV must be pulled before it runs."""
        if not self.waiting or len(self.placed) + len(self.running) >= self.max_batch:
            return None
        slot = self.pool.take(self.waiting[0].need)
        if slot is None:
            return None
        sequence = self.waiting.popleft()
        sequence.slot = slot
        self.placed.append(sequence)
        return sequence

    def start(self, sequence: Sequence) -> None:
        """A placed sequence's KV has arrived: it joins the next step."""
        self.placed.remove(sequence)
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its slot."""
        for group in (self.waiting, self.placed, self.running):
            if sequence in group:
                group.remove(sequence)
        if sequence.slot is not None:
            self.pool.give_back(sequence.slot)
            sequence.slot = None

    def check_integrity(self) -> None:
        """Raise AssertionError if slots overlap or leak, or a sequence is in two places."""
        held = sorted(s.slot for s in [*self.placed, *self.running] if s.slot is not None)
        assert all(a.start + a.size <= b.start for a, b in zip(held, held[1:], strict=False)), "slots overlap"
        assert sum(s.size for s in held) + self.pool.free_tokens == self.pool.budget, "slots leaked"
        assert len(set(map(id, self.sequences))) == len(self.sequences), "a sequence is in two places"
