"""Time of a decode step by number format and batch, against the machine's floor: `python -m sun_perf.steps --threads 1`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sun.decode.cpu import CpuExecutor
from sun.decode.executor import TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.model.loading import load_decode
from sun.model.quantise import FULL
from sun_perf import figures, samples
from sun_perf.floor import Machine, floor_ms
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result

BATCHES = (1, 4, 8, 16, 32)
CONTEXT = 256
PLAIN = "torch fp32"
"""The reference executor: plain torch, no packing, no compiled kernels."""
Step = Callable[[int], None]


def steppers(base_dir: str | Path, schemes: Sequence[str], threads: int, batches=BATCHES, plain: bool = False) -> dict[str, Step]:
    """Scheme -> a function that takes one step of a batch whose sequences have `CONTEXT` tokens; plain: `PLAIN` beside fp32, too.

    Sets torch's threads.
    """
    torch.set_num_threads(threads)
    made: dict[str, Step] = {}
    for scheme in schemes:
        base, model = load_decode(base_dir, scheme)
        pool = KVPool(base.geometry, max(batches) * (CONTEXT + 1))
        pool.data.zero_()
        executors = {PLAIN: TorchExecutor(model, pool)} if plain and scheme == FULL else {}
        executors[scheme] = CpuExecutor(model, pool, threads)
        slots = [pool.take(CONTEXT + 1) for _ in range(max(batches))]
        for name, executor in executors.items():
            made[name] = lambda batch, executor=executor, slots=slots: executor.step([1] * batch, [CONTEXT] * batch, slots[:batch])
    return made


def measure(made: dict[str, Step], batches=BATCHES, rounds: int = 12) -> dict[tuple[str, int], list[float]]:
    """ms of ``rounds`` steps by name and batch. All take turns, so that other load hits them alike; the first round warms up."""
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in made for batch in batches}
    for turn in range(rounds + 1):
        for (name, batch), kept in times.items():
            started = time.perf_counter()
            made[name](batch)
            if turn:
                kept.append((time.perf_counter() - started) * 1e3)
    return times


def ratio(times: dict[tuple[str, int], list[float]], over: str, under: str, batch: int) -> float:
    """Median of the rounds' ratios of two step times."""
    return samples.ratio(list(zip(times[over, batch], times[under, batch], strict=True)))["median"]


def report(base_dir: str | Path, schemes: list[str], threads: int, batches=BATCHES, rounds: int = 12) -> dict:
    """What `steps.json` holds: rows of ms, QSUN over SUN by scheme and batch, and steps over the floor."""
    before = Machine.measure(threads)
    times = measure(steppers(base_dir, schemes, threads, batches, plain=True), batches, rounds)
    limits = before.best(Machine.measure(threads))
    base, model = load_decode(base_dir)
    floors = {(scheme, batch): floor_ms(model, limits, scheme, batch, CONTEXT) for scheme in schemes for batch in batches}
    low = [scheme for scheme in schemes if scheme != FULL]
    best = min(low, key=lambda scheme: statistics.median(times[scheme, max(batches)]), default=None)
    return {
        "machine": machine(), "commit": commit(RESULTS), "date": time.strftime("%Y-%m-%d"),
        "settings": {"schemes": schemes, "threads": threads, "batches": list(batches), "rounds": rounds}, "limits": limits.as_dict(), "context": CONTEXT,
        "steps": [{"scheme": name, "threads": threads, "batch": batch, "context": CONTEXT, "ms": round(statistics.median(kept), 2)}
                  for (name, batch), kept in times.items()],
        "qsun_scheme": best,
        "qsun_over_sun": {str(batch): round(ratio(times, FULL, best, batch), 2) for batch in batches} if best else {},
        "over_plain_torch": {scheme: {str(b): round(ratio(times, PLAIN, scheme, b), 2) for b in batches} for scheme in schemes},
        "step_over_floor": {scheme: {str(b): round(statistics.median(times[scheme, b]) / floors[scheme, b], 2) for b in batches} for scheme in schemes},
    }


def main() -> None:
    """Print a line per number format and write `perf/results/steps.json` and its figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="build/base", help="the base model's folder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a step; a worker of the server has 1")
    parser.add_argument("--schemes", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "steps.json")
    arguments = parser.parse_args()
    made = report(arguments.base, arguments.schemes, arguments.threads, rounds=arguments.rounds)
    for name in dict.fromkeys(row["scheme"] for row in made["steps"]):
        rows = [row for row in made["steps"] if row["scheme"] == name]
        print(f"{name:10} " + "  ".join(f"{row['batch']}: {row['ms']:6.1f} ms" for row in rows))
    for key in ("qsun_over_sun", "step_over_floor", "limits"):
        print(f"{key}: {made[key]}")
    write_result(arguments.out, made)
    if figure := figures.steps(made):
        figure.savefig(arguments.out.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
