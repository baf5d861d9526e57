"""What there is right now: requests by task, and the workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from sun.router.active import Active
from sun.router.meter import Meter
from sun.router.pool import Pool


def set_gauges(meter: Meter, tasks: Iterable[str], requests: Iterable[Active], pool: Pool) -> None:
    """Note how many requests of each task there are, and the workers' loads."""
    counts = {(name, task): 0 for name in ("running", "waiting") for task in tasks}
    for active in requests:
        if active.record.task:
            key = ("running" if active.admitted else "waiting", active.record.task)
            counts[key] = counts.get(key, 0) + 1
    for (name, task), count in counts.items():
        meter.set(f"sun_num_requests_{name}", count, task=task)
    loads, used = pool.loads, dict(pool.used)
    for worker in pool.workers:
        meter.set("sun_worker_up", worker in loads, worker=worker)
        meter.set("sun_worker_outstanding_tokens", loads[worker].tokens if worker in loads else 0, worker=worker)
        meter.set("sun_kv_cache_usage_ratio", used.get(worker, 0.0) if worker in loads else 0.0, worker=worker)


def set_prefills(meter: Meter, known: set[str], tasks: Iterable[str], present: Callable[[str], bool]) -> None:
    """Note which tasks' prefill modules are there. known: the tasks of earlier times, to which these are added."""
    tasks = set(tasks)
    known |= tasks
    for task in known:
        # A gauge cannot be taken back: one that stayed at 0 would look like a dead module for ever.
        meter.set("sun_prefill_up", present(task) if task in tasks else math.nan, task=task)
