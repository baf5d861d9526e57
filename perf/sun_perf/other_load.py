"""How much of the machine others used while something was measured, so that a result can say how undisturbed it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from sun_client import shm

TICK = os.sysconf("SC_CLK_TCK")


def watch(session: int) -> Callable[[], float]:
    """Start watching; the function returned says how many CPUs' worth of time, on average since then, went neither to the server's
    processes (of ``session``) nor to this process and children of it that have ended.
    """
    started, before = time.monotonic(), _busy_s() - _ours_s(session)
    return lambda: round(max(0.0, _busy_s() - _ours_s(session) - before) / (time.monotonic() - started), 2)


def _busy_s() -> float:
    """CPU seconds of the whole machine that were not idle; what the host took from it counts."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


def _ours_s(session: int) -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + sum(map(_cpu_s, shm.processes(session)))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK
