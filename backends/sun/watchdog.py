"""Ends this process when it hangs, or must. A dead one is noticed, healed, and costs its requests little; one that hangs would hold them for ever."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

HANG_S = 120.0
LOOKS = 20
"""How often it looks within the time that is allowed."""


class Watchdog:
    """progress(): a number that changes as long as work goes on, None while there is none. Asked every ``hang_s`` / `LOOKS` seconds.

    Where it stays the same for ``hang_s`` seconds, or Python itself stands still (a lock held in native code, say), the process exits with every
    thread's stack on standard error, which is the server's log. The clock is a thread of faulthandler's, which needs nothing of Python.
    A process has one such clock, so one watchdog.
    """

    def __init__(self, progress: Callable[[], int | None], hang_s: float = HANG_S):
        if not hang_s > 0:
            raise ValueError(f"hang_s: got {hang_s:g}, must be over 0")
        self._progress, self._hang_s = progress, hang_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the process end in its own time."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen = None
        faulthandler.dump_traceback_later(self._hang_s, exit=True)
        while not self._closed.wait(self._hang_s / LOOKS):
            now = self._progress()
            if now is None or now != seen:
                seen = now
                faulthandler.dump_traceback_later(self._hang_s, exit=True)


def end(why: str) -> NoReturn:
    """Exit at once, with the reason on standard error: for a process that can do its work no more, but is loaded anew when it is dead."""
    print(why, file=sys.stderr, flush=True)
    os._exit(1)
