"""Who hears the decode workers: a thread for each that has sequences of this router, for as long as it has any."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from sun.messages import TokenEvent
from sun.router.active import Active
from sun.router.errors import Gone
from sun.router.fleet import Fleet
from sun.router.pace import Pace
from sun.router.placement import Placement
from sun.router.pool import Pool

log = logging.getLogger("sun.router")


class Listeners:
    """Follows workers' events, and has others go on with what a worker no longer tells of. Safe to use from any thread.

    router: its name with the workers. active: its requests in flight by their key, which others change meanwhile. take(request, event) is called with
    each event of a request's sequence. Once ``closed`` is set, nobody new is listened to.
    """

    def __init__(self, fleet: Fleet, router: str, pool: Pool, placement: Placement, pace: Pace, active: Mapping[str, Active],
                 take: Callable[[Active, TokenEvent], None], closed: threading.Event):
        self.fleet, self.router, self.pool, self.placement, self.pace = fleet, router, pool, placement, pace
        self._active, self._take, self._closed = active, take, closed
        self._threads: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()

    def listen(self, worker: str) -> None:
        """A worker has a sequence: hear it, if nobody does."""
        with self._lock:
            if worker in self._threads or self._closed.is_set():
                return
            thread = self._threads[worker] = threading.Thread(target=self._hear, args=(worker,), name=f"listen-{worker}", daemon=True)
        thread.start()

    def lose(self, worker: str) -> None:
        """A worker is dead or hangs: whoever listens to it does no more with what it had."""
        with self._lock:
            self._threads.pop(worker, None)

    def join(self, timeout_s: float) -> None:
        """Wait until all have ended, at most so long."""
        end = time.monotonic() + timeout_s
        for thread in list(self._threads.values()):
            thread.join(max(0.0, end - time.monotonic()))

    def _hear(self, worker: str) -> None:
        """Follow a worker's events while this router has sequences there."""
        known = self._admitted(worker)
        broken = None
        try:
            for step in self.fleet.listen(worker, self.router):
                self.pool.report(worker, step.load)
                self.pace.note(len(step.events))
                for event in step.events:
                    active = self._active.get(event.id.rpartition("-")[0])
                    if active is not None:
                        self._take(active, event)
        except Gone as error:
            self.pool.lose(worker, error)
        except Exception as error:
            log.exception("events of %s ended", worker)
            known, broken = self._admitted(worker), error
        with self._lock:
            mine = self._threads.get(worker) is threading.current_thread()
            if mine:
                del self._threads[worker]
        if not mine:
            return  # the worker was lost meanwhile, and all that it had is elsewhere
        if broken is not None:
            self.placement.abort(worker, self.placement.move(worker, list(known.values()), f"decode worker {worker} failed: {broken}"))
        else:  # what it had all along and did not end would wait for events that never come
            lost = [active for admission, active in known.items() if active.admission == admission]
            self.placement.move(worker, lost, f"decode worker {worker} no longer has the sequence")
        if self._admitted(worker):
            self.listen(worker)

    def _admitted(self, worker: str) -> dict[str, Active]:
        """The sequences that a worker has of this router, by their ids there."""
        return {a.admission: a for a in list(self._active.values()) if a.worker == worker and a.admitted and not a.ended}
