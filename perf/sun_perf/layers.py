"""Linear layers of a decode step by our kernels and by the libraries', by turns: `python -m sun_perf.layers`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sun.decode.packed import pack
from sun.decode.vectors import AVX512, VNNI
from sun.model.loading import load_decode
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result
from sun_perf.steps import Step, measure

ROWS = (1, 4, 8, 16, 32)
SCHEMES = ("fp32", "bf16", "int8")
WAYS = {"ours": True, "library": False}
"""Whether one thread is said to run a layer: it has our kernels then."""


@torch.inference_mode()
def report(base_dir: str | Path, schemes: Sequence[str] = SCHEMES, counts: Sequence[int] = ROWS, rounds: int = 9) -> dict:
    """What `layers.json` holds: ms for all linear layers and the head, once each, by one thread; medians."""
    torch.set_num_threads(1)
    made = []
    for scheme in schemes:
        model = load_decode(base_dir, scheme)[1]
        linears = [getattr(layer, name) for layer in model.layers for name in ("q", "k", "v", "o", "gate", "up", "down")] + [model.head]
        # Within 1, as integer layers want it; those with two codes have two rows for each.
        inputs = [torch.rand(2 * max(counts), linear.weight.shape[1]) * 2 - 1 for linear in linears]
        copies = [2 if linear.codes and linear.codes.split else 1 for linear in linears]

        def runner(alone: bool) -> Step:
            packed = [pack(linear.weight, scheme, linear.codes, alone) for linear in linears]
            return lambda rows: [layer(x[: rows * n]) for layer, x, n in zip(packed, inputs, copies, strict=True)]

        times = measure({way: runner(alone) for way, alone in WAYS.items()}, counts, rounds)
        made += [{"scheme": scheme, "rows": rows} | {way: round(statistics.median(times[way, rows]), 2) for way in WAYS} for rows in counts]
    return {"machine": machine(), "commit": commit(RESULTS), "date": time.strftime("%Y-%m-%d"), "threads": 1, "rounds": rounds, "layers": made}


def main() -> None:
    """Print a line per number format and batch, and write `perf/results/layers.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="build/base", help="the base model's folder")
    parser.add_argument("--out", type=Path, default=RESULTS / "layers.json")
    arguments = parser.parse_args()
    if not (AVX512 and VNNI):
        parser.exit(1, "layers: this CPU has no AVX-512 with VNNI, for which our kernels are; libraries' are used here\n")
    made = report(arguments.base)
    for row in made["layers"]:
        print("{scheme:5} {rows:3} rows: ours {ours:6.1f} ms, library {library:6.1f} ms".format(**row))
    write_result(arguments.out, made)


if __name__ == "__main__":
    main()
