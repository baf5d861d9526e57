"""Coming and going beside those who serve: a new module is imported and read, and an old one's process ends, at a low priority, so that decode steps elsewhere come first."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
NICE = 5
"""A third of the share of a thread at 0 (Linux's scheduler); much less would let a busy machine hold up a load for minutes."""


def gently(load: Callable[[], T]) -> T:
    """The result of ``load``, which runs in a thread of its own. Linux's priorities are a thread's, and no ordinary user's can be raised again;
    so whatever is to serve later must not be started in it.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            os.nice(NICE)
            result.set_result(load())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="load")
    thread.start()
    thread.join()
    return result.result()


def go_gently() -> None:
    """For a process that has done its work: the rest of this thread's, Python's own end, gives way, and is short. Python would look through all of
    torch's objects for garbage, more than a third of a second of CPU, of which nobody has anything: the memory goes with the process.
    """
    gc.freeze()
    os.nice(NICE)
