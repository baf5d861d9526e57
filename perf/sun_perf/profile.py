"""Where a decode step's time goes, and the router's, in a server under load: `python -m sun_perf.profile`. Needs py-spy."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from sun.stubs import Stubs
from sun_client.client import SunClient
from sun_client.errors import SunError
from sun_client.server import Ports, interruptible
from sun_client.show import quiet_libraries, say
from sun_perf.fleet_layout import SYSTEMS, Material, lay_out, task_names
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result
from sun_perf.running import running, url
from sun_perf.stacks import Stack, py_spy, record, shares, waiting
from sun_perf.workload import Lengths, Request, draw

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / ".run" / "profile"
TASKS = 2
"""One decode worker for both: see `SYSTEMS`."""
WORKER, ROUTER, STEP = "decode_0", "sun", "_step_loop"
PROMPT, OUTPUT = Lengths(32, 0.5, 8, 128), Lengths(64, 0.3, 16, 128)


def measure(scratch: Path, ports: Ports, material: Material, concurrency: int, seconds: int) -> dict:
    """Serve, load and sample; returns the content of `profile.json` but for machine and commit."""
    root = lay_out(scratch / "root", scratch / "full", material, SYSTEMS["sun"], TASKS)
    requests = draw(task_names(TASKS), 0, 8 * concurrency, 0, PROMPT, OUTPUT)
    with running(root, ports) as server, SunClient(url(server)) as client:
        pids = {model: pid for model, (pid, *_) in Stubs(server.pid).models().items()} | {"tritonserver": server.pid}
        with loaded(client, requests, concurrency):
            before, used = client.worker_stats(WORKER, after=2**62).step, cpu_s(pids)
            recordings = [
                record(pids[name], seconds, idle, scratch / f"{name}-{idle}.raw") for name, idle in ((WORKER, True), (WORKER, False), (ROUTER, False))]
            started = time.monotonic()
            stacks = [end() for end in recordings]
            wall, used_then = time.monotonic() - started, cpu_s(pids)
            steps = client.worker_stats(WORKER, after=before).steps
    if not steps:
        raise RuntimeError(f"{WORKER} took no step in {seconds} s")
    tokens = sum(sum(step.tasks.values()) for step in steps)
    return {
        "settings": {"concurrency": concurrency, "seconds": seconds, "tasks": TASKS, "threads": material.threads, "scheme": material.scheme},
        "tokens_per_s": round(tokens / wall, 1), "steps": len(steps), "batch": round(tokens / len(steps), 1),
        "cpus": {name: round((used_then[name] - used[name]) / wall, 3) for name in pids},
        **summary(*stacks, step_ms=1e3 * wall / len(steps))}


def summary(worker: Sequence[Stack], worker_runs: Sequence[Stack], router_runs: Sequence[Stack], step_ms: float) -> dict:
    """The tables, of samples of all of the worker's threads, of those that ran, and of the router's that ran. step_ms: wall time between two steps.

    step: ms of each part of it, by the wall time of the thread that takes steps, less what it waited for work: waiting for a core or for Python's
    lock counts where it happens. worker_others, router: shares of the samples of the worker's other threads and of the router's.
    """
    step = [stack for stack in worker if stack.inside(STEP)]
    if not step:
        raise RuntimeError(f"py-spy saw nothing of {STEP} in the decode worker")
    idle = waiting(step)
    return {
        "step_ms": round(step_ms, 2), "waiting_ms": round(step_ms * idle, 2),
        "step": {name: round(step_ms * (1 - idle) * share, 3) for name, share in shares(step).items()},
        "worker_others": shares(stack for stack in worker_runs if not stack.inside(STEP)), "router": shares(router_runs)}


def cpu_s(pids: dict[str, int]) -> dict[str, float]:
    """Seconds of CPU that each process has used so far."""
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}


@contextmanager
def loaded(client: SunClient, requests: Sequence[Request], concurrency: int) -> Iterator[None]:
    """Inside, ``concurrency`` requests are in flight, the list's over and over; it begins after as many answers. Raises what a request raises."""
    source, lock, stop, warm = itertools.cycle(requests), threading.Lock(), threading.Event(), threading.Semaphore(0)

    def ask() -> None:
        try:
            while not stop.is_set():
                with lock:
                    request = next(source)
                for _ in client.stream(request.task, request.prompt, sampling=request.sampling):
                    if stop.is_set():
                        break
                warm.release()
        finally:
            warm.release()

    with ThreadPoolExecutor(concurrency) as pool:
        asking = [pool.submit(ask) for _ in range(concurrency)]
        try:
            for _ in range(concurrency):
                warm.acquire()
            yield
        finally:
            stop.set()
    for each in asking:
        each.result()


def table(made: dict, rows: int = 12) -> Iterator[str]:
    """The figures as lines, the largest ``rows`` of each table."""
    yield f"{made['tokens_per_s']} tokens/s, {made['steps']} steps of {made['batch']} sequences"
    yield f"{made['step_ms']} ms from step to step, {made['waiting_ms']} of them waiting for work"
    yield "CPUs: " + ", ".join(f"{name} {used:g}" for name, used in made["cpus"].items())
    for key, title, unit in (("step", "a decode step", "ms"), ("worker_others", "the worker's other threads", "share"), ("router", "the router", "share")):
        yield f"\n{title}, {unit}:"
        yield from (f"{value:10.3f}  {name}" for name, value in itertools.islice(made[key].items(), rows))


def main() -> None:
    """Print the tables and write `perf/results/profile.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--seconds", type=int, default=30, help="of sampling")
    parser.add_argument("--scheme", default="fp32", help="of the decode module")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each prefill module and the decode worker")
    parser.add_argument("--port", type=int, default=18200, help="first of three free ports")
    parser.add_argument("--out", type=Path, default=RESULTS / "profile.json")
    args = parser.parse_args()
    py_spy()
    adapters = sorted(path.parent for path in (ROOT / "build" / "tasks").glob("*/adapter_config.json"))
    material = Material(ROOT / "build" / "base", ROOT / "backends", adapters, args.threads, args.scheme)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with interruptible(), quiet_libraries(), tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        made = measure(Path(scratch), Ports(args.port, args.port + 1, args.port + 2), material, args.concurrency, args.seconds)
    write_result(args.out, {"machine": machine(), "commit": commit(ROOT), **made})
    for line in table(made):
        say(line)


if __name__ == "__main__":
    try:
        main()
    except (SunError, RuntimeError, ValueError, OSError) as error:
        sys.exit(f"profile: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
