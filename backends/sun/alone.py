"""Work that leaves files for all processes is done by one of them while the others wait for it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL_S, MOST_S = 0.05, 120.0


@contextmanager
def alone(folder: Path, most_s: float = MOST_S) -> Iterator[None]:
    """Inside, no other process is inside for this folder. Whoever has waited ``most_s`` seconds goes in all the same: the other may have been stopped.

    So does everybody where the folder cannot be locked, as on some file systems.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + most_s
        with suppress(OSError):
            while not _locked(fd) and time.monotonic() < end:
                time.sleep(POLL_S)
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    """Whether this file is locked now, by us."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
