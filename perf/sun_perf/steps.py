"""Time of a decode step by batch size: `python -m sun_perf.steps --threads 2`."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sun.decode.executor import TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.model.loading import load_decode

BATCHES = (1, 4, 8, 16, 32)
ROUNDS = 12
CONTEXT = 256


def measure(base_dir: str, threads: int) -> dict[int, float]:
    """Median ms of a step, by batch size, sequences of about ``CONTEXT`` tokens. Batch sizes take turns, so that other load hits all alike."""
    torch.set_num_threads(threads)
    base, model = load_decode(base_dir)
    pool = KVPool(base.geometry, max(BATCHES) * (CONTEXT + ROUNDS + 1))
    pool.data.zero_()
    executor = TorchExecutor(model, pool)
    slots = [pool.take(CONTEXT + ROUNDS + 1) for _ in range(max(BATCHES))]
    times: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for turn in range(ROUNDS + 2):
        for batch in BATCHES:
            started = time.perf_counter()
            executor.step([1] * batch, [CONTEXT - 1 + turn] * batch, slots[:batch])
            if turn >= 2:  # the first two warm up
                times[batch].append((time.perf_counter() - started) * 1e3)
    return {batch: statistics.median(values) for batch, values in times.items()}


def main() -> None:
    """Print a line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="build/base", help="the base model's folder")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    for batch, ms in measure(arguments.base, arguments.threads).items():
        print(f"batch {batch:2}: {ms:6.1f} ms/step, {batch / ms * 1e3:6.1f} tokens/s")


if __name__ == "__main__":
    main()
