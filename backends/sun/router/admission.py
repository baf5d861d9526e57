"""Which request may begin: within what the workers can hold, fairly among tasks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from sun.router.active import Active
from sun.router.fair_queue import Bounds, FairQueue


class Admission:
    """A fair queue before prefill, and books of what left it. Safe to use from any thread.

    starting: requests that may be on their way from the queue into a worker at once; a task may have three quarters of them, so
    that another always finds a place. room(): tokens that all running requests may need together, None for no limit. A request
    larger than it runs alone. wait_s(tokens): how long serving so many takes.
    """

    def __init__(self, bounds: Bounds, starting: int, room: Callable[[], int | None], wait_s: Callable[[float], float] = lambda tokens: 0.0):
        self._queue: FairQueue[Active] = FairQueue(bounds, wait_s)
        self._starting, self._task_starting, self._room = starting, max(1, starting * 3 // 4), room
        self._begun: Counter[str] = Counter()
        self._running: dict[str, int] = {}
        self._away: dict[str, float] = {}
        self._barred: set[str] = set()
        self._lock = threading.Lock()

    @property
    def running_tokens(self) -> int:
        """Tokens that the running requests may need."""
        return sum(self._running.values())

    @property
    def tokens(self) -> int:
        """Tokens that all requests may need, those that wait and those that run."""
        with self._lock:
            return self.running_tokens + self._queue.tokens

    def put(self, active: Active) -> None:
        """Let a request wait. Raises RequestError (UNAVAILABLE) if too much waits already."""
        with self._lock:
            self._queue.put(active.admit.task, active.cost, active, active.priority)
        if active.ended:  # its end may have looked for it here before it came
            self.ended(active)

    def take(self) -> Active | None:
        """The next request that may begin, if any; say `begun` when it has come into a worker or failed to."""
        with self._lock:
            if self._begun.total() >= self._starting:
                return None
            room = self._room() if self._running else None
            barred = self._barred | {task for task, count in self._begun.items() if count >= self._task_starting}
            popped = self._queue.pop(None if room is None else room - self.running_tokens, frozenset(barred))
            if popped is None:
                return None
            task, cost, active = popped
            self._begun[task] += 1
            self._running[active.key] = cost
            return active

    def put_back(self, active: Active) -> None:
        """A taken request's prefill module is not there: it is the next of its task again, when there is one (see `look`)."""
        with self._lock:
            task = active.admit.task
            self._away.setdefault(task, time.monotonic())
            self._barred.add(task)
            if self._running.pop(active.key, None) is not None:
                self._queue.put_back(task, active.cost, active, active.priority)
        if active.ended:
            self.ended(active)

    def look(self, present: Callable[[str], bool]) -> None:
        """Let requests of those tasks begin again whose prefill module is ``present``; if it is not ready yet, they are put back."""
        for task in list(self._barred):
            if present(task):
                with self._lock:
                    self._barred.discard(task)

    def back(self, task: str) -> None:
        """The task's prefill module works."""
        with self._lock:
            self._away.pop(task, None)

    def away_s(self, active: Active) -> float:
        """For how many seconds the prefill module that a request waits for has not been there; 0 if it is, or the request has its KV."""
        if active.admit is None or active.ticket is not None or active.admit.task not in self._barred:
            return 0.0
        return time.monotonic() - self._away.get(active.admit.task, time.monotonic())

    def begun(self, active: Active) -> None:
        """A taken request needs its place among the starting no longer."""
        with self._lock:
            self._begun[active.admit.task] -= 1

    def ended(self, active: Active) -> None:
        """A request ended, whether it waited or ran; asking twice is harmless."""
        with self._lock:
            cost = self._running.pop(active.key, None)
            if cost is not None:
                self._queue.refund(active.admit.task, cost - len(active.admit.prompt) - len(active.tokens))
            else:
                self._queue.remove(active)
