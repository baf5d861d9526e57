"""Loading beside those who serve: a new module is imported and read at a low priority, so that decode steps elsewhere come first."""

from __future__ import annotations

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
