"""A token bucket: so much a minute, with bursts up to a minute's worth."""

from __future__ import annotations

from collections.abc import Callable

MINUTE_S = 60.0


class Bucket:
    """Holds ``per_minute`` at most, is full at first and refills evenly. clock() is in seconds. Not for several threads at once."""

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute, self._clock = per_minute, clock
        self._level, self._seen = float(per_minute), clock()

    def wait(self, amount: int) -> float:
        """Seconds until ``amount`` can be taken: 0 if it can be now, infinity if it never can."""
        self._fill()
        if amount > self.per_minute:
            return float("inf")
        return max(0.0, amount - self._level) * MINUTE_S / self.per_minute

    def take(self, amount: int) -> None:
        """Take it, whether or not it is there."""
        self._fill()
        self._level -= amount

    def give_back(self, amount: int) -> None:
        """What was taken and not used."""
        self._fill()
        self._level = min(self._level + amount, float(self.per_minute))

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._level + (now - self._seen) * self.per_minute / MINUTE_S, float(self.per_minute))
        self._seen = now
