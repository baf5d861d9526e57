"""One layer's decode attention by our kernel and by others, by turns: `python -m sun_perf.attention`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sun_perf.attention.case import TOLERANCE, Case, Shape
from sun_perf.attention.ways import WAYS, Run, Way
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result

BATCHES, CONTEXTS = (1, 8, 32), (128, 512, 2048)
LAYERS = 30
MOST_BYTES = 2**28
"""Of K and V in one layout: a step goes through all layers, so that one layer's K and V have left the nearer caches until its next turn."""


def check(case: Case, runs: Mapping[str, Run]) -> None:
    """Raise AssertionError naming a way whose output is off the formula's by more than `TOLERANCE`."""
    expected = case.expected()
    for title, run in runs.items():
        error = float(np.abs(run(0) - expected).max())
        assert error <= TOLERANCE, f"{title}, batch {case.batch}, context {case.context}: off by {error:.2g}, the tolerance is {TOLERANCE:g}"


def measure(case: Case, runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median ms a layer. All take turns, each through all layers; the first round warms up."""
    times: dict[str, list[float]] = {title: [] for title in runs}
    for turn in range(rounds + 1):
        for title, run in runs.items():
            started = time.perf_counter()
            for layer in range(case.layers):
                run(layer)
            if turn:
                times[title].append((time.perf_counter() - started) * 1e3 / case.layers)
    return {title: round(statistics.median(kept), 4) for title, kept in times.items()}


def report(ways: Sequence[Way] = WAYS, batches: Sequence[int] = BATCHES, contexts: Sequence[int] = CONTEXTS, rounds: int = 15,
           shape: Shape = Shape(), most_bytes: int = MOST_BYTES) -> dict:
    """What `attention.json` holds. One thread each, as a worker has by default; sets torch's."""
    torch.set_num_threads(1)
    present = [way for way in ways if way.missing is None]
    rows = []
    for batch in batches:
        for context in contexts:
            layer_bytes = 2 * batch * context * shape.kv_heads * shape.head_dim * 4
            case = Case(batch, context, max(1, min(LAYERS, most_bytes // layer_bytes)), shape)
            runs = {way.title: way.prepare(case) for way in present}
            check(case, runs)
            times = measure(case, runs, rounds)
            rows.append({"batch": batch, "context": context, "layers": case.layers, "ms": times,
                         "ours_over_best": round(times[ways[0].title] / min(times.values()), 3)})
    return {
        "machine": machine(), "commit": commit(RESULTS), "shape": vars(shape), "threads": 1, "rounds": rounds, "tolerance": TOLERANCE,
        "versions": {way.title: way.version for way in present}, "skipped": {way.title: way.missing for way in ways if way.missing}, "rows": rows}


def main() -> None:
    """Print a line per batch and context, and write `perf/results/attention.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens of the longest sequence; the shortest has half of them")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    arguments = parser.parse_args()
    made = report(WAYS, arguments.batches, arguments.contexts, arguments.rounds)
    for title, reason in made["skipped"].items():
        print(f"{title}: skipped, {reason}")
    titles = list(made["rows"][0]["ms"])
    print("ms a layer     " + "".join(f"{title:>22}" for title in titles) + "        ours over best")
    for row in made["rows"]:
        print(f"{row['batch']:3} x {row['context']:<8} " + "".join(f"{row['ms'][title]:22.3f}" for title in titles) + f"{row['ours_over_best']:22.2f}")
    write_result(arguments.out, made)


if __name__ == "__main__":
    main()
