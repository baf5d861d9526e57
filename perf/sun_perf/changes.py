"""How long streams pause while other tasks come, change and go, and while the decode module is replaced, beside as long a time without a change.

`python -m sun_perf.changes` serves a copy of the repository's own tasks and writes `perf/results/changes.json`. Two tasks' streams go on all the time; a third task is
added, updated and removed, and the decode workers are loaded anew, each by its `sun` command, as an operator would. A pause is the time between two tokens of a stream.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sun.router.tasks import TaskRegistry
from sun_client.client import SunClient
from sun_client.show import say
from sun_perf.machine import commit, machine
from sun_perf.own_server import ROOT, own_server
from sun_perf.results import RESULTS, write_result
from sun_perf.running import url
from sun_perf.workload import WORDS, Request

LIMIT_MS = 200.0
GUEST = "guest"
TOKENS = 96
"""Of an answer: short, since a worker that drains waits for those that it has."""


class Streams:
    """Streams that go on, answer after answer, as a context manager; and when their tokens came."""

    def __init__(self, server: str, tasks: Sequence[str], each: int):
        self._client, self._end = SunClient(server), threading.Event()
        self._pauses: list[tuple[float, float]] = []
        self.failed: list[str] = []
        names = [task for task in tasks for _ in range(each)]
        self._threads = [threading.Thread(target=self._go_on, args=(task, i), daemon=True) for i, task in enumerate(names)]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def longest_ms(self, start: float, end: float) -> float:
        """The longest pause that lies, at least in part, between two times (of time.perf_counter)."""
        return round(max((b - a for a, b in list(self._pauses) if b > start and a < end), default=0.0) * 1e3, 1)

    def _go_on(self, task: str, seed: int) -> None:
        words = itertools.cycle(WORDS[seed % len(WORDS):] + WORDS[: seed % len(WORDS)])
        while not self._end.is_set():
            request, last = Request(task, " ".join(itertools.islice(words, 20)), TOKENS), 0.0
            try:
                for _ in self._client.stream(task, request.prompt, sampling=request.sampling):
                    now = time.perf_counter()
                    if last:
                        self._pauses.append((last, now))
                    last = now
            except Exception as error:
                self.failed.append(f"{task}: {error}")
                self._end.wait(0.5)


def actions(root: Path, weights: Sequence[Path]) -> dict[str, Callable[[], None]]:
    """The changes, by name, in the order of a round. weights: of the third task, first and later. Raise RuntimeError with what a command said."""
    def sun(*words: str) -> None:
        done = subprocess.run([sys.executable, "-m", "sun_client.cli", *words, "--root", str(root)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"sun {' '.join(words)}: {done.stderr.strip()}")

    return {
        "add a task": lambda: sun("task", "add", GUEST, "--weights", str(weights[0])),
        "update it": lambda: sun("task", "add", GUEST, "--weights", str(weights[1])),
        "remove it": lambda: sun("task", "remove", GUEST),
        "replace the decode module": lambda: sun("decode", "replace")}


def measure(server: str, tasks: Sequence[str], each: int, changes: dict[str, Callable[[], None]], rounds: int) -> dict:
    """``rounds`` times each change, and after each as long a time without one. ms; failed is what streams ended with, and should be empty."""
    found = {name: {"seconds": [], "longest_ms": [], "still_longest_ms": []} for name in changes}
    with Streams(server, tasks, each) as streams:
        time.sleep(3.0)
        for turn in range(rounds):
            for name, change in changes.items():
                start = time.perf_counter()
                change()
                middle = time.perf_counter()
                time.sleep(middle - start)
                longest, still = streams.longest_ms(start, middle), streams.longest_ms(middle, time.perf_counter())
                for key, value in {"seconds": round(middle - start, 1), "longest_ms": longest, "still_longest_ms": still}.items():
                    found[name][key].append(value)
                say(f"round {turn + 1}, {name}: {longest:.0f} ms, without {still:.0f} ms, in {middle - start:.1f} s")
    return {"limit_ms": LIMIT_MS, "streams": {"tasks": list(tasks), "each": each}, "changes": found, "failed": streams.failed}


def main() -> None:
    """Serve, change, report; exit code 1 if a stream failed, or paused for longer than `LIMIT_MS`."""
    parser = argparse.ArgumentParser(prog="python -m sun_perf.changes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of all changes (default 3)")
    parser.add_argument("--each", type=int, default=2, help="streams of each of two tasks (default 2)")
    parser.add_argument("--port", type=int, default=18500, help="first of three free ports (default 18500)")
    args = parser.parse_args()
    with own_server(args.port, changing=True) as server:
        first, second, *_ = TaskRegistry(server.root / "model_repository").names()
        weights = [ROOT / "build" / "tasks" / name for name in ("bash", "math")]
        report = measure(url(server), (first, second), args.each, actions(server.root, weights), args.rounds)
    report |= {"machine": machine(), "commit": commit(ROOT), "date": time.strftime("%Y-%m-%d")}
    write_result(RESULTS / "changes.json", report)
    for line in report["failed"]:
        say(line, "red")
    late = [name for name, found in report["changes"].items() if max(found["longest_ms"]) > LIMIT_MS]
    if late:
        say(f"Longer than {LIMIT_MS:g} ms: {', '.join(late)}", "red")
    sys.exit(1 if report["failed"] or late else 0)


if __name__ == "__main__":
    main()
