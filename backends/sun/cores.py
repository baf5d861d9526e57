"""Which of the machine's cores a worker runs on, and who goes first where workers share one. Linux only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

SPAN = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")
LARGEST = 2**16
"""More cores than any machine has: a longer list is a mistake, and not worth its memory."""
LAST_NICE = 19


def parse_cores(text: str) -> frozenset[int]:
    """Cores of a list as taskset and cpusets have it: "0", "1-3", "0,2-3". Raises ValueError for anything else."""
    cores: set[int] = set()
    for part in text.split(","):
        span = SPAN.fullmatch(part)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
        if not first <= last < LARGEST:
            raise ValueError(f'cores: got {text!r}, expected numbers and ranges such as "0", "1-3" or "0,2-3"')
        cores.update(range(first, last + 1))
    return frozenset(cores)


def format_cores(cores: Iterable[int]) -> str:
    """The shortest such list."""
    spans: list[list[int]] = []
    for core in sorted(cores):
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def run_on(cores: str = "", threads: int = 1, nice: int = 0) -> None:
    """Keep the calling thread, and all threads that it starts from now on, to ``cores`` (empty: to none in particular), and
    let others go first by ``nice`` (0 to 19: at 19 it gets about 1/70 of a core that somebody else wants, and all of one that nobody does).

    Call it before torch is imported or has run anything: torch's own threads inherit it from the one that first has work for them.
    threads: how many the worker will have at work. Raises ValueError naming the field and the cores that there are.
    """
    if not 0 <= nice <= LAST_NICE:
        raise ValueError(f"nice: got {nice}, expected 0 to {LAST_NICE}")
    if cores:
        wanted, have = parse_cores(cores), os.sched_getaffinity(os.getpid())
        if not wanted <= have:
            raise ValueError(f"cores: got {cores!r}, this process may use {format_cores(have)}")
        if threads > len(wanted):
            raise ValueError(f"cores: {cores!r} is fewer than threads, {threads}")
        os.sched_setaffinity(0, wanted)  # 0 is the calling thread, here and below
    if nice:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
