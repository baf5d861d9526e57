"""How fast tokens are served, and so how long it takes until there is room."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

MEMORY_S = 30.0
"""What was served so long ago counts a third of what is served now."""
IDLE_S = 2.0
"""A longer time without a token was idle, and says nothing of the pace."""


class Pace:
    """The recent rate of served tokens, of prompts and of answers, while there was something to do. Safe to use from any thread.

    An exponentially weighted mean: of tokens and of the time they took, either with the same weights.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._seen = clock()
        self._tokens = self._seconds = 0.0

    def note(self, tokens: int) -> None:
        """So many tokens were served just now."""
        with self._lock:
            now = self._clock()
            passed, self._seen = min(now - self._seen, IDLE_S), now
            kept = math.exp(-passed / MEMORY_S)
            self._tokens, self._seconds = self._tokens * kept + tokens, self._seconds * kept + passed

    def seconds(self, tokens: float) -> float:
        """How long serving so many tokens takes; 0 as long as nothing was served."""
        with self._lock:
            return tokens * self._seconds / self._tokens if self._tokens else 0.0
