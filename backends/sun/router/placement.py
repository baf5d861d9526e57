"""Which worker decodes a sequence: from its first one to the next, where that one is lost, leaves, or no longer has it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sun.router.active import Active
from sun.router.errors import Gone, RequestError
from sun.router.fleet import Fleet
from sun.router.meter import Meter
from sun.router.pool import Pool

log = logging.getLogger("sun.router")
STRANDED_S = 30.0
"""How long a request waits for a worker to come back when none lives."""
MOST_WORKERS = 4
"""A sequence that so many workers have had is not given to another: it may be what kills them."""


class Placement:
    """Gives sequences to workers, and to others when that comes to nothing. Safe to use from any thread.

    listen(worker) is called when a worker has a sequence, again(active) when a sequence needs another worker: it must have `assign` called
    in a thread that may wait, or do nothing if the router is closing. fail(active, error) ends one.
    """

    def __init__(self, fleet: Fleet, pool: Pool, meter: Meter, listen: Callable[[str], None], again: Callable[[Active], None],
                 fail: Callable[[Active, RequestError], None]):
        self.fleet, self.pool, self.meter = fleet, pool, meter
        self._listen, self._again, self._fail = listen, again, fail
        self.stranded: dict[str, float] = {}
        """Until when a sequence waits for a worker, by its request's key."""
        self._orphans: dict[str, list[str]] = {worker: [] for worker in pool.workers}
        self._lock = threading.Lock()

    def assign(self, active: Active) -> None:
        """Give a sequence to a worker. One that cannot take it is passed over; if none lives, or none whose pool could hold it, it waits for one.

        Raises what the workers refused it with, if all that live did, and none that may come back could hold more.
        """
        tried: set[str] = set()
        failed: Exception | None = None
        while not active.ended:
            tokens, need = active.admit.params.max_tokens - len(active.tokens), active.admit.need
            worker = self.pool.pick(active.admit.task, tokens, need, tried, active.bound)
            if worker is None:
                small = all(self.pool.too_small(name, need) for name in tried)
                if failed is not None and not (small and self.pool.fits_one_away(need)):
                    raise failed
                active.waits_until = active.waits_until or time.monotonic() + STRANDED_S
                self.stranded[active.key] = active.waits_until
                if active.ended:  # and whoever ended it may have come before it was noted
                    self.forget(active)
                return
            admit = active.assign(worker, self.pool.module(worker))
            if admit is None:
                return self.pool.arrived(worker, tokens, need)
            try:
                ack = self.fleet.admit(worker, admit, active.shipment)
                self.pool.report(worker, ack.load)
            except Exception as error:
                if active.withdraw(worker) is None:
                    return  # ended meanwhile, or the worker was found dead and another is being looked for already
                refused = isinstance(error, ValueError) or getattr(error, "code", None) == "INVALID_ARG"
                if refused and not self.pool.too_small(worker, need):
                    raise
                if isinstance(error, Gone):
                    self.pool.lose(worker, error)
                else:
                    failed = error
                    tried.add(worker)
                continue
            finally:
                self.pool.arrived(worker, tokens, need)
            if ack.draining:
                self.pool.drained(worker)
                if active.withdraw(worker) is None:
                    return
                continue
            if active.accept(admit.id, ack.module):
                return self._listen(worker)
            return self.abort(worker, [admit.id])  # whoever ended or moved it could not know that the worker has it now

    def move(self, worker: str, sequences: list[Active], why: str) -> list[str]:
        """Have sequences that a worker lost go on elsewhere, from the same KV and the tokens that there are; their ids there."""
        moved = []
        for active in sequences:
            admission = active.withdraw(worker)
            if admission is None:
                continue
            moved.append(admission)
            self.meter.add("sun_failover_total", worker=worker)
            if active.assigned >= MOST_WORKERS:
                self._fail(active, RequestError("INTERNAL", f"{why}; it was the {active.assigned}th to have the sequence"))
            else:
                self._again(active)
        return moved

    def lost(self, worker: str, sequences: list[Active]) -> None:
        """A worker is dead or hangs: of these sequences, others go on with what it had."""
        orphans = self.move(worker, sequences, f"decode worker {worker} died")
        with self._lock:
            self._orphans[worker] += orphans

    def found(self, worker: str) -> None:
        """A worker is back: if it only hung, it drops what others have taken over."""
        with self._lock:
            orphans, self._orphans[worker] = self._orphans[worker], []
        self.abort(worker, orphans)

    def abort(self, worker: str, admissions: list[str]) -> None:
        """Have a worker drop sequences, by their ids there; that it cannot is only logged."""
        if not admissions:
            return
        try:
            self.pool.report(worker, self.fleet.abort(worker, admissions).load)
        except Exception:
            log.exception("could not abort %s on %s", ", ".join(admissions), worker)

    def check(self, active: Active) -> None:
        """Let a sequence that waits for a worker go on if there is one now, or end if it has waited `STRANDED_S`."""
        until = self.stranded.get(active.key)
        if until is None:
            return
        if time.monotonic() > until:
            return self._fail(active, no_worker(active.bound))
        if self.pool.has(active.admit.task, active.bound):
            self.forget(active)
            self._again(active)

    def forget(self, active: Active) -> None:
        """It no longer waits for a worker: it has ended, or goes on."""
        self.stranded.pop(active.key, None)


def no_worker(module: str = "") -> RequestError:
    """What a request ends with that has waited `STRANDED_S` for a worker, of one module if it began with it."""
    which = f" of the module that began the answer ({module})" if module else ""
    return RequestError("UNAVAILABLE", f"no decode worker{which} lives that could take it, for {STRANDED_S:g} s now; try again later")
