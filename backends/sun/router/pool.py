"""The decode workers as the router knows them: their loads, and who of them lives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sun.messages import Load, Stats
from sun.router.errors import Gone
from sun.router.fleet import Fleet
from sun.router.policy import Policy

log = logging.getLogger("sun.router")
NO_LIMIT = 2**62
"""Room of a worker that has not said yet how much it has."""
BEAT_S = 0.4
"""Seconds between heartbeats. With what a fleet takes for one (1.5 s in Triton), a dead or hanging worker is known within 2 s."""


class Pool:
    """Loads as the workers report them and with what is on its way to them, and a heartbeat for each. Safe to use from any thread.

    lost(worker) is called when a worker is found dead, found(worker) when it answers again, from a thread of the pool's.
    """

    def __init__(self, fleet: Fleet, workers: list[str], policy: Policy, lost: Callable[[str], None], found: Callable[[str], None]):
        self.fleet, self.policy, self._lost, self._found = fleet, policy, lost, found
        self.workers = tuple(workers)
        self._budgets: dict[str, int] = {}
        self._modules: dict[str, str] = {}
        self._draining: set[str] = set()
        self._said = dict.fromkeys(workers, Load(0, 0, NO_LIMIT))
        self._under_way = dict.fromkeys(workers, Load(0, 0))
        self.used: dict[str, float] = {}
        """Share of its KV pool's tokens that a worker has taken."""
        self._there = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._beats = [threading.Thread(target=self._beat, args=(worker,), name=f"beat-{worker}", daemon=True) for worker in workers]

    @property
    def budget(self) -> int | None:
        """Tokens for which the living workers have room together, less those that drain; None as long as none has said.

        With no such worker, that of all: their requests wait for one with their KV in shared memory, which is no larger for that.
        """
        with self._lock:
            return sum(self._budgets.get(worker, 0) for worker in self._said.keys() - self._draining) or sum(self._budgets.values()) or None

    @property
    def away_s(self) -> float:
        """For how many seconds there has been no worker that takes sequences; 0 if there is one."""
        with self._lock:
            return 0.0 if self._said.keys() - self._draining else time.monotonic() - self._there

    @property
    def loads(self) -> dict[str, Load]:
        """Of the living workers."""
        with self._lock:
            return self._loads()

    def _loads(self) -> dict[str, Load]:
        return {worker: said + self._under_way[worker] for worker, said in self._said.items()}

    def start(self) -> None:
        """Begin the heartbeats."""
        for beat in self._beats:
            beat.start()

    def close(self) -> None:
        """Stop the heartbeats; one that waits for a worker is not waited for."""
        self._closed.set()

    def pick(self, task: str, tokens: int, need: int, tried: set[str], module: str = "") -> str | None:
        """A living worker for ``task`` that is not among ``tried`` and does not drain; None if there is none.

        A sequence of ``tokens`` to come and ``need`` KV slots is on its load at once, until `arrived`, whatever it reports meanwhile.
        module: only one that decodes with this module; "" for any.
        """
        with self._lock:
            worker = self._choose(task, need, tried, module)
            if worker is not None:
                self._under_way[worker] += Load(tokens, 1, -need)
            return worker

    def has(self, task: str, module: str = "") -> bool:
        """Whether there is a worker that `pick` would give."""
        with self._lock:
            return self._choose(task, 0, set(), module) is not None

    def _choose(self, task: str, need: int, tried: set[str], module: str) -> str | None:
        loads = self._loads()
        barred = tried | self._draining
        if module:
            barred |= {name for name in loads if self._modules.get(name, module) != module}
        return self.policy.pick(task, {name: load for name, load in loads.items() if name not in barred}, need)

    @property
    def largest(self) -> int | None:
        """Tokens of the largest KV pool of any worker that has been heard of; None if none has."""
        with self._lock:
            return max(self._budgets.values(), default=None)

    def too_small(self, worker: str, need: int) -> bool:
        """Whether the worker's whole KV pool is known to be smaller than ``need``."""
        with self._lock:
            return self._budgets.get(worker, NO_LIMIT) < need

    def fits_one_away(self, need: int) -> bool:
        """Whether a worker that is lost or drains, and may come back, has a KV pool for ``need`` slots."""
        with self._lock:
            here = self._said.keys() - self._draining
            return any(budget >= need for worker, budget in self._budgets.items() if worker not in here)

    def module(self, worker: str) -> str:
        """The module that a worker decodes with, by its last heartbeat; "" if there was none."""
        with self._lock:
            return self._modules.get(worker, "")

    def arrived(self, worker: str, tokens: int, need: int) -> None:
        """What the worker was picked for is in its own reports from now on, or never was to be."""
        with self._lock:
            self._under_way[worker] += Load(-tokens, -1, need)

    def report(self, worker: str, load: Load) -> None:
        """What the worker says its load is; heeded unless it has said something later."""
        with self._lock:
            if worker in self._said and load.at >= self._said[worker].at:
                self._said[worker] = load

    def drained(self, worker: str) -> None:
        """The worker says that it takes no new sequences; the next heartbeat without it is its return."""
        with self._lock:
            self._draining.add(worker)

    def lose(self, worker: str, why: Exception) -> None:
        """The worker is dead or hangs."""
        with self._lock:
            known = self._said.pop(worker, None) is not None
        if known and not self._closed.is_set():
            log.warning("decode worker %s is lost: %s", worker, why)
            self._lost(worker)

    def _beat(self, worker: str) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                stats = self.fleet.stats(worker)
            except Gone as error:
                self.lose(worker, error)
            except Exception:  # a refusal is no death: a server that is stopping refuses all calls, and lets sequences end
                log.debug("no heartbeat of %s", worker, exc_info=True)
            else:
                self._find(worker, stats)

    def _find(self, worker: str, stats: Stats) -> None:
        with self._lock:
            self._budgets[worker], self._modules[worker] = stats.budget_tokens, stats.module
            self.used[worker] = 1 - stats.free_tokens / stats.budget_tokens
            (self._draining.add if stats.draining else self._draining.discard)(worker)
            if not stats.draining:
                self._there = time.monotonic()
            new = worker not in self._said
            # A slot that comes free between two events, as an aborted sequence's does, is told of by nothing else.
            if new or stats.load.at >= self._said[worker].at:
                self._said[worker] = stats.load
        if new:
            log.warning("decode worker %s is back", worker)
            self._found(worker)
