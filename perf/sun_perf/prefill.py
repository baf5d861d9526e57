"""Prefill by what runs it, by prompt length: torch beside ONNX Runtime. `python -m sun_perf.prefill --threads 1`."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from sun.model.loading import load_prefill
from sun.prefill.executor import Executor, TorchExecutor
from sun.prefill.jobs import Chunk, Job
from sun.prefill.onnx import OnnxExecutor
from sun_build.export.onnx import export_onnx
from sun_perf import samples
from sun_perf.machine import commit, machine

RESULTS = Path(__file__).parents[1] / "results"
LENGTHS = (16, 32, 64, 128, 256, 512)
TORCH = "torch"
Run = Callable[[Sequence[int]], None]


def own_mb() -> float:
    """This process's memory that is its own, in MB: not files mapped from disk, which processes share."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1e3


def run_of(executor: Executor, geometry) -> Run:
    """A function that runs a prompt's tokens whole."""
    @torch.inference_mode()
    def run(ids: Sequence[int]) -> None:
        kv = torch.empty(geometry.layers, 2, geometry.kv_heads, len(ids), geometry.head_dim)
        executor.run([Chunk(Job(torch.tensor(ids), Future(), kv=kv), len(ids))])

    return run


def runs(base_dir: Path, task_dir: Path, exports: Path, opsets: Sequence[int], threads: int, lengths: Sequence[int]) -> tuple[dict[str, Run], dict[str, float]]:
    """Name -> a run, and the MB of its process's own that loading it and one run of the longest prompt took. Exports into ``exports``."""
    torch.set_num_threads(threads)
    folders = {}
    for opset in opsets:  # all before anything is loaded: an export takes memory, too
        folders[f"onnx opset {opset}"] = exports / str(opset)
        folders[f"onnx opset {opset}"].mkdir()
        export_onnx(base_dir, task_dir, exports / str(opset), opset=opset)
    made: dict[str, Run] = {}
    memory: dict[str, float] = {}
    for name, folder in {TORCH: None, **folders}.items():
        before = own_mb()
        task, model = load_prefill(base_dir, task_dir)
        made[name] = run_of(OnnxExecutor(folder, model.base, task, threads) if folder else TorchExecutor(model), model.geometry)
        made[name]([1] * max(lengths))
        memory[name] = round(own_mb() - before, 1)
    return made, memory


def measure(made: dict[str, Run], lengths: Sequence[int], rounds: int) -> dict[tuple[str, int], list[float]]:
    """ms of ``rounds`` prompts by name and length. All take turns, so that other load hits them alike; the first round warms up."""
    times: dict[tuple[str, int], list[float]] = {(name, length): [] for name in made for length in lengths}
    for turn in range(rounds + 1):
        for length in lengths:
            ids = [(7 * turn + 31 * i) % 1000 for i in range(length)]
            for name, run in made.items():
                started = time.perf_counter()
                run(ids)
                if turn:
                    times[name, length].append((time.perf_counter() - started) * 1e3)
    return times


def report(base_dir: Path, task_dir: Path, opsets: Sequence[int], threads: int, lengths: Sequence[int] = LENGTHS, rounds: int = 12) -> dict:
    """What `prefill.json` holds: ms by name and length, torch's time over each other's (median of the rounds' ratios), and MB."""
    with tempfile.TemporaryDirectory() as exports:
        made, memory = runs(base_dir, task_dir, Path(exports), opsets, threads, lengths)
        times = measure(made, lengths, rounds)
    ratios = {
        name: {str(n): round(samples.ratio(list(zip(times[TORCH, n], times[name, n], strict=True)))["median"], 2) for n in lengths}
        for name in made if name != TORCH}
    return {
        "machine": machine(), "commit": commit(RESULTS), "threads": threads, "rounds": rounds,
        "ms": {name: {str(n): round(statistics.median(times[name, n]), 2) for n in lengths} for name in made},
        "times_as_fast_as_torch": ratios, "own_memory_mb": memory,
    }


def main() -> None:
    """Print a line per executor and write `perf/results/prefill.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("build/base"), help="the base model's folder")
    parser.add_argument("--task", default="bash", help="a task of model_repository")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a pass; a prefill model of the server has 1")
    parser.add_argument("--opsets", type=int, nargs="+", default=[18, 23])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "prefill.json")
    arguments = parser.parse_args()
    made = report(arguments.base, Path("model_repository") / f"prefill_{arguments.task}" / "1", arguments.opsets, arguments.threads,
                  rounds=arguments.rounds)
    for name, row in made["ms"].items():
        print(f"{name:14} " + "  ".join(f"{n}: {ms:7.1f} ms" for n, ms in row.items()) + f"  {made['own_memory_mb'][name]:.0f} MB of its own")
    for name, row in made["times_as_fast_as_torch"].items():
        print(f"{name} against torch: " + ", ".join(f"{n}: {ratio}x" for n, ratio in row.items()))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
