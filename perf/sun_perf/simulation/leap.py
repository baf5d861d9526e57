"""Decode steps in a row, as one event."""

from __future__ import annotations

import math

from sun_perf.simulation.costs import StepTime

ROUNDING = 1e-6  # of a step: one that ends at this very moment has ended


class Leap:
    """``steps`` decode steps of the same ``batch`` sequences from time ``began``; times in ms.

    tokens: sum of the sequences' contexts in the first step. Each step raises it by ``batch``, so the first k steps take
    k * (linear + slope * k) with slope = per_token * batch / 2 and linear = base + per_token * tokens - slope.
    """

    __slots__ = ("began", "batch", "steps", "linear", "slope")

    def __init__(self, times: StepTime, began: float, batch: int, tokens: int, steps: int):
        self.began, self.batch, self.steps = began, batch, steps
        self.slope = times.per_token * batch / 2
        self.linear = times.base(batch) + times.per_token * tokens - self.slope

    def end(self, steps: int) -> float:
        """When its first ``steps`` have ended."""
        return self.began + steps * (self.linear + self.slope * steps)

    def whole_steps(self, now: float) -> int:
        """Steps that have ended."""
        return int(min(self.steps, self._steps(now) + ROUNDING))

    def started_steps(self, now: float) -> int:
        """Steps that have begun: a sequence that comes now joins after them."""
        return min(self.steps, math.ceil(self._steps(now) - ROUNDING))

    def _steps(self, now: float) -> float:
        """The inverse of `end`, a fraction included."""
        ms = now - self.began
        return 2 * ms / (self.linear + math.sqrt(self.linear * self.linear + 4 * self.slope * ms))
