"""What another task's flood does to a task that keeps to its share: TTFT with and without the flood, by turns.

`python -m sun_perf.fairness` serves the repository's own tasks and writes `perf/results/fairness.json`. The first task sends `--rate` requests a
second in each phase. In phase "flood" the second task sends `--times` as many, which must be more than the machine serves, and the router's fair queue
holds them apart. In phase "one line" the flood is of the first task itself, and so are the requests that are timed: first come, first served.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

from sun.router.tasks import TaskRegistry
from sun_client.client import SunClient
from sun_client.errors import SunError
from sun_client.show import say
from sun_perf.load import OwnLoad
from sun_perf.machine import commit, machine
from sun_perf.own_server import ROOT, own_server
from sun_perf.results import RESULTS, write_result
from sun_perf.running import url
from sun_perf.samples import percentiles, ratio
from sun_perf.workload import Lengths, Request, draw, poisson

PROMPT, ANSWER = Lengths(24, 0, 24, 24), Lengths(16, 0, 16, 16)
PHASES = ("quiet", "flood", "one line")
AT_ONCE = 128
"""Most requests of a flood in flight, less than the router refuses: so that those of one line are not refused, but wait. More wait on their own side."""
RAMP_S, IDLE_S = 3.0, 120.0


@contextmanager
def flood(server: str, task: str, rate: float, seed: int) -> Iterator[Counter]:
    """Inside, Poisson arrivals of a task at ``rate`` a second, whatever has been answered; counts what became of them. All end with it."""
    counts: Counter[str] = Counter()
    over = threading.Event()
    client, pool = SunClient(server), ThreadPoolExecutor(AT_ONCE)
    requests = draw([task], 0, AT_ONCE, seed, PROMPT, ANSWER)

    def ask(request: Request) -> None:
        if over.is_set():  # what has waited on our side gets its turn when others are cut off, before the pool is told to drop it
            return
        try:
            client.generate(request.task, request.prompt, sampling=request.sampling)
            counts["answered"] += 1
        except SunError as error:
            counts["cut off" if over.is_set() else "refused" if error.retry_after_s is not None else "failed"] += 1

    def send() -> None:
        due = time.perf_counter()
        for request, gap in zip(requests * 1000, poisson(1000 * AT_ONCE, rate, seed), strict=True):
            due += gap
            if over.wait(max(0.0, due - time.perf_counter())):
                return
            counts["sent"] += 1
            pool.submit(ask, request)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        yield counts
    finally:
        over.set()
        sender.join()
        client.close()  # ends what is in flight
        pool.shutdown(cancel_futures=True)


def phase(server: str, kept: str, flooding: str | None, rate: float, times: float, seconds: float, seed: int) -> dict:
    """One phase: TTFT in ms of the kept task's requests, all of which must be answered, and the flood's counts."""
    count = max(4, round(rate * seconds))
    with flood(server, flooding, rate * times, seed) if flooding else nullcontext(Counter()) as counts:
        time.sleep(RAMP_S if flooding else 0.0)
        samples = OwnLoad().open(server, draw([kept], 0, count, seed, PROMPT, ANSWER), poisson(count, rate, seed))
    with SunClient(server) as client:
        end = time.monotonic() + IDLE_S
        while not client.idle():
            if time.monotonic() > end:
                raise RuntimeError(f"fairness: the server has work for {IDLE_S:g} s after a phase")
            time.sleep(0.5)
    return {"ttft_ms": [round(sample.ttft_ms, 1) for sample in samples], "flood": dict(counts)}


def measure(server: str, kept: str, flooding: str, rate: float, times: float, seconds: float, rounds: int) -> dict:
    """``rounds`` times each phase, by turns. Factors are of one round's p95, flooded over quiet."""
    turns = []
    for turn in range(-1, rounds):
        floods = {"quiet": None, "flood": flooding, "one line": kept}
        # The first round warms up.
        turns.append({name: phase(server, kept, floods[name], rate, times, seconds if turn >= 0 else 3.0, turn + 1) for name in PHASES})
        if turn >= 0:
            say(f"round {turn + 1}: " + ", ".join(f"{name} p95 {percentiles(turns[-1][name]['ttft_ms'])['p95']:.0f} ms" for name in PHASES))
    turns = turns[1:]

    def p95(turn: dict, name: str) -> float:
        return percentiles(turn[name]["ttft_ms"])["p95"]

    return {
        "kept": kept, "flooding": flooding, "rate": rate, "times": times, "seconds": seconds,
        "ttft_ms": {name: percentiles([value for turn in turns for value in turn[name]["ttft_ms"]]) for name in PHASES},
        "p95_over_quiet": {name: ratio([(p95(turn, name), p95(turn, "quiet")) for turn in turns]) for name in PHASES[1:]},
        "rounds": turns}


def main() -> None:
    """Serve, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m sun_perf.fairness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="of all three phases (default 4)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a phase (default 30)")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second of the task that keeps to its share (default 1)")
    parser.add_argument("--times", type=float, default=20.0, help="how much more the flood sends (default 20)")
    parser.add_argument("--port", type=int, default=18400, help="first of three free ports (default 18400)")
    args = parser.parse_args()
    with own_server(args.port) as server:
        kept, flooding, *_ = TaskRegistry(server.root / "model_repository").names()
        report = measure(url(server), kept, flooding, args.rate, args.times, args.seconds, args.rounds)
    report |= {"machine": machine(), "commit": commit(ROOT), "date": time.strftime("%Y-%m-%d")}
    write_result(RESULTS / "fairness.json", report)
    say(json.dumps({name: report[name] for name in ("ttft_ms", "p95_over_quiet")}))


if __name__ == "__main__":
    main()
