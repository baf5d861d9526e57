"""The times between two tokens of a request, as a histogram that is counted here and told to the meter now and then.

There is one for each token. A meter's histogram takes one value a call, and each call goes to tritonserver and back; counters take any number at once.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from itertools import accumulate

from sun.router.meter import GAPS, GAPS_S, Meter

BOUNDS = (*(f"{bound:g}" for bound in GAPS_S), "+Inf")
"""Values of the label `le`: a bucket counts what is at most that."""


class Gaps:
    """Counts gaps by task until they are told. Safe to use from any thread."""

    def __init__(self, meter: Meter):
        self._meter = meter
        self._lock = threading.Lock()
        self._counts = self._empty()

    def note(self, task: str, seconds: float) -> None:
        """So long after a request's last token comes its next."""
        place = bisect_left(GAPS_S, seconds)
        with self._lock:
            counts = self._counts[task]
            counts[place] += 1
            counts[-1] += seconds

    def tell(self) -> None:
        """Hand what came since the last time to the meter."""
        with self._lock:
            told, self._counts = self._counts, self._empty()
        for task, (*counts, seconds) in told.items():
            upto = list(accumulate(counts))
            self._meter.add(f"{GAPS}_count", upto[-1], task=task)
            self._meter.add(f"{GAPS}_sum", seconds, task=task)
            # The widest first: whoever reads meanwhile finds no bucket with more than a wider one has.
            for bound, count in zip(reversed(BOUNDS), reversed(upto), strict=True):
                self._meter.add(f"{GAPS}_bucket", count, task=task, le=bound)

    @staticmethod
    def _empty() -> defaultdict[str, list[float]]:
        """A count for each bound, then the sum of seconds."""
        return defaultdict(lambda: [0] * len(BOUNDS) + [0.0])
