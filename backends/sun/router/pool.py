"""The decode workers as the router knows them: their loads, and who of them lives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sun.messages import Ack, Stats, StepEvents
from sun.router.errors import Gone
from sun.router.fleet import Fleet
from sun.router.policy import Load, Policy

log = logging.getLogger("sun.router")
BEAT_S = 0.5
"""Seconds between heartbeats. With what a fleet takes for one (2 s in Triton), a dead or hanging worker is known within 2.5 s."""


class Pool:
    """Loads in tokens as the workers report them, and a heartbeat for each. Safe to use from any thread.

    lost(worker) is called when a worker is found dead, found(worker) when it answers again, from a thread of the pool's.
    """

    def __init__(self, fleet: Fleet, workers: list[str], policy: Policy, lost: Callable[[str], None], found: Callable[[str], None]):
        self.fleet, self.policy, self._lost, self._found = fleet, policy, lost, found
        self.workers = tuple(workers)
        self._budgets: dict[str, int] = {}
        self._modules: dict[str, str] = {}
        self._draining: set[str] = set()
        self.loads = dict.fromkeys(workers, Load(0, 0))
        """Of the living workers."""
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
            return sum(self._budgets.get(worker, 0) for worker in self.loads.keys() - self._draining) or sum(self._budgets.values()) or None

    @property
    def away_s(self) -> float:
        """For how many seconds there has been no worker that takes sequences; 0 if there is one."""
        with self._lock:
            return 0.0 if self.loads.keys() - self._draining else time.monotonic() - self._there

    def start(self) -> None:
        """Begin the heartbeats."""
        for beat in self._beats:
            beat.start()

    def close(self) -> None:
        """Stop the heartbeats; one that waits for a worker is not waited for."""
        self._closed.set()

    def pick(self, task: str, tokens: int, tried: set[str], module: str = "") -> str | None:
        """A living worker for ``task`` that is not among ``tried`` and does not drain; None if there is none. A sequence of ``tokens`` is on its load at once.

        module: only one that decodes with this module; "" for any.
        """
        with self._lock:
            barred = tried | self._draining
            if module:
                barred |= {name for name in self.loads if self._modules.get(name, module) != module}
            worker = self.policy.pick(task, {name: load for name, load in self.loads.items() if name not in barred})
            if worker is not None:
                self._add(worker, tokens, 1)
            return worker

    def put_back(self, worker: str, tokens: int) -> None:
        """The worker did not take what it was picked for."""
        with self._lock:
            self._add(worker, -tokens, -1)

    def _add(self, worker: str, tokens: int, sequences: int) -> None:
        load = self.loads.get(worker)
        if load is not None:
            self.loads[worker] = Load(load.tokens + tokens, load.sequences + sequences)

    def report(self, worker: str, said: Ack | StepEvents) -> None:
        """What the worker says its load is."""
        with self._lock:
            if worker in self.loads:
                self.loads[worker] = Load(said.load, said.sequences)

    def drained(self, worker: str) -> None:
        """The worker says that it takes no new sequences; the next heartbeat without it is its return."""
        with self._lock:
            self._draining.add(worker)

    def lose(self, worker: str, why: Exception) -> None:
        """The worker is dead or hangs."""
        with self._lock:
            known = self.loads.pop(worker, None) is not None
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
            new = worker not in self.loads
            if new:
                self.loads[worker] = Load(stats.load, stats.running + stats.waiting)
        if new:
            log.warning("decode worker %s is back", worker)
            self._found(worker)
