"""Ranges of a fixed budget: taken from the tightest gap, and given back."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

KV_TOKENS = 16384
"""Budget of a decode worker's KV pool, where nothing says how large it is."""


@dataclass(frozen=True, order=True)
class Slot:
    """``start`` to ``start + size`` of a budget."""

    start: int
    size: int


class Slots:
    """The gaps of a budget."""

    def __init__(self, budget: int):
        self.budget = budget
        self.gaps = [Slot(0, budget)]

    @property
    def free(self) -> int:
        """What is in no slot (not all in one piece, perhaps)."""
        return sum(slot.size for slot in self.gaps)

    def take(self, size: int) -> Slot | None:
        """A slot of ``size`` from the tightest gap that holds it, or None."""
        gap = min((s for s in self.gaps if s.size >= size), key=lambda s: s.size, default=None)
        if gap is None:
            return None
        self.gaps.remove(gap)
        if gap.size > size:
            bisect.insort(self.gaps, Slot(gap.start + size, gap.size - size))
        return Slot(gap.start, size)

    def give_back(self, slot: Slot) -> None:
        """Return a slot, joining it with free neighbours. Raises ValueError if any of it was free already."""
        at = bisect.bisect(self.gaps, slot)
        before = self.gaps[at - 1] if at else None
        after = self.gaps[at] if at < len(self.gaps) else None
        start, end = slot.start, slot.start + slot.size
        if (before and before.start + before.size > start) or (after and after.start < end) or end > self.budget:
            raise ValueError(f"{slot} was not taken")
        if after and after.start == end:
            self.gaps.pop(at)
            end = after.start + after.size
        if before and before.start + before.size == start:
            self.gaps.pop(at - 1)
            start = before.start
        bisect.insort(self.gaps, Slot(start, end - start))
