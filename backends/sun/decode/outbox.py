"""Events on their way to the routers: one queue each, kept until somebody listens."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator

from sun.messages import StepEvents

ABANDONED_S = 30.0
"""A router that has sequences here and has not listened for so long is taken for dead."""


class Outbox:
    """Per router, the steps it has not read and how many sequences it has here. Safe to use from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps: dict[str, deque[StepEvents]] = defaultdict(deque)
        self._live: dict[str, int] = defaultdict(int)
        self._listener: dict[str, object] = {}
        self._unheard_since: dict[str, float] = {}

    def opened(self, router: str) -> None:
        """One more sequence of this router lives here."""
        with self._changed:
            self._forget()
            if not self._live[router] and router not in self._listener:
                self._unheard_since[router] = time.monotonic()
            self._live[router] += 1

    def closed(self, router: str) -> None:
        """One sequence of this router is gone; its last event, if any, was put before."""
        with self._changed:
            self._live[router] -= 1
            self._changed.notify_all()

    def put(self, router: str, step: StepEvents) -> bool:
        """Queue a step's events; False, and all its steps dropped, if the router is taken for dead."""
        with self._changed:
            if time.monotonic() - self._unheard_since.get(router, time.monotonic()) > ABANDONED_S:
                self._steps[router].clear()
                return False
            self._steps[router].append(step)
            self._changed.notify_all()
            return True

    def _forget(self) -> None:
        """Let go of what routers without a sequence have not fetched since long: they are dead, or never were."""
        long_ago = time.monotonic() - ABANDONED_S
        for router in [name for name, since in self._unheard_since.items() if since < long_ago and not self._live[name]]:
            for book in (self._unheard_since, self._steps, self._live):
                book.pop(router, None)

    def listen(self, router: str) -> Iterator[list[StepEvents]]:
        """Yield this router's steps, in lists of all that are ready, until none is left and it has no sequence here.

        A second listener of the same router takes over; the first one ends.
        """
        me = object()
        with self._changed:
            self._listener[router] = me
            self._unheard_since.pop(router, None)
            self._changed.notify_all()
        try:
            while steps := self._next(router, me):
                yield steps
        finally:
            with self._changed:
                if self._listener.get(router) is me:
                    del self._listener[router]
                    if self._live[router]:
                        self._unheard_since[router] = time.monotonic()
                    else:
                        del self._live[router]
                    self._changed.notify_all()

    def wait_heard(self, seconds: float) -> bool:
        """Wait until the routers have what was put for them, but no longer than so many seconds; whether they have. For when no sequence is left."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._listener and not any(self._steps.values()), seconds)

    def _next(self, router: str, me: object) -> list[StepEvents]:
        """All steps that are ready, waiting for one; empty when ``me`` should stop listening."""
        with self._changed:
            self._changed.wait_for(lambda: self._listener.get(router) is not me or self._steps[router] or not self._live[router])
            if self._listener.get(router) is not me:  # taken over, perhaps by one that has ended already
                return []
            return list(self._steps.pop(router, ()))
