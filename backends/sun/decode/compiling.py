"""The first run of compiled kernels, when numba compiles those that are not in its files yet (some 20 s for a decode step's)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from sun.alone import alone

log = logging.getLogger("sun.decode")
KERNELS = 32
"""More than a step has kernels, of all the types that they are called with."""


def first_run(run: Callable[[], object]) -> None:
    """Run it, one process at a time: two would both compile, and share the machine meanwhile.

    numba keeps each kernel in a file, and a call fails if that cannot be written; the next call has the kernel all the same. Raises
    OSError if they go on failing.
    """
    with alone(Path(__file__).parent):
        for attempt in range(KERNELS + 1):
            try:
                run()
            except OSError as error:
                if attempt == KERNELS:
                    raise
                log.warning("a compiled kernel could not be kept for the next start: %s", error)
            else:
                return
