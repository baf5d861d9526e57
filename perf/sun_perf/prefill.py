"""Prefill by what runs it, by prompt length: torch beside ONNX Runtime. `python -m sun_perf.prefill --threads 1`."""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from sun.model.loading import load_prefill
from sun.prefill.executor import Executor, TorchExecutor
from sun.prefill.exported import checkpoint_of
from sun.prefill.jobs import Chunk, Job
from sun.prefill.onnx import OnnxExecutor
from sun_build.export.onnx import OPSET, export_onnx
from sun_perf import samples
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result

LENGTHS = (16, 32, 64, 128, 256, 512)
TORCH = "torch"
LORA = ("merged", "separate")
Run = Callable[[Sequence[int]], None]
T = TypeVar("T")


def own_mb() -> float:
    """This process's memory that is its own, in MB: not files mapped from disk, which processes share."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1e3


def run_of(base_dir: Path, task_dir: Path, folder: Path | None, threads: int) -> Run:
    """A function that runs a prompt's tokens whole: in ONNX Runtime with the export in ``folder``, or in torch. Sets torch's threads."""
    torch.set_num_threads(threads)
    task, model = load_prefill(base_dir, task_dir)
    executor: Executor = OnnxExecutor(folder, checkpoint_of(base_dir, task_dir, task), model.base, task, threads) if folder else TorchExecutor(model)
    geometry = model.geometry

    @torch.inference_mode()
    def run(ids: Sequence[int]) -> None:
        kv = torch.empty(geometry.layers, 2, geometry.kv_heads, len(ids), geometry.head_dim)
        executor.run([Chunk(Job(torch.tensor(ids), Future(), kv=kv), len(ids))])

    return run


def memory_mb(base_dir: Path, task_dir: Path, folder: Path | None, threads: int, tokens: int) -> float:
    """MB of its own that a process takes for loading and a run of ``tokens``; in a process without a past."""
    before = own_mb()
    run = run_of(base_dir, task_dir, folder, threads)
    run([1] * tokens)
    taken = own_mb() - before
    del run  # held until here: what it loaded is what is weighed
    return round(taken, 1)


def alone(call: Callable[..., T], *arguments, **more) -> T:
    """A call's result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments, **more).result()


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


def report(base_dir: Path, task_dir: Path, loras: Sequence[str], threads: int, opset: int = OPSET, lengths: Sequence[int] = LENGTHS,
           rounds: int = 12) -> dict:
    """What `prefill.json` holds: ms by name and length, torch's time over each other's (median of the rounds' ratios), and MB.

    loras: "merged" is the fastest that ONNX Runtime does, "separate" shares the base's weights as torch does.
    """
    with tempfile.TemporaryDirectory() as exports:
        folders: dict[str, Path | None] = {TORCH: None}
        made: dict[str, Run] = {}
        memory: dict[str, float] = {}
        for lora in loras:
            folders[f"onnx {lora}"] = folder = Path(exports) / lora
            folder.mkdir()
            alone(export_onnx, base_dir, task_dir, folder, merged=lora == "merged", opset=opset)
        for name, folder in folders.items():
            memory[name] = alone(memory_mb, base_dir, task_dir, folder, threads, max(lengths))
            made[name] = run_of(base_dir, task_dir, folder, threads)
        times = measure(made, lengths, rounds)
    ratios = {
        name: {str(n): round(samples.ratio(list(zip(times[TORCH, n], times[name, n], strict=True)))["median"], 2) for n in lengths}
        for name in made if name != TORCH}
    return {
        "machine": machine(), "commit": commit(RESULTS), "threads": threads, "rounds": rounds, "opset": opset,
        "ms": {name: {str(n): round(statistics.median(times[name, n]), 2) for n in lengths} for name in made},
        "times_as_fast_as_torch": ratios, "own_memory_mb": memory,
    }


def main() -> None:
    """Print a line per executor and write `perf/results/prefill.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("build/base"), help="the base model's folder")
    parser.add_argument("--task", default="math", help="a task of model_repository")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a pass; a prefill model of the server has 1")
    parser.add_argument("--lora", choices=LORA, nargs="+", default=LORA, help="how the adapter is exported")
    parser.add_argument("--opset", type=int, default=OPSET)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "prefill.json")
    arguments = parser.parse_args()
    made = report(arguments.base, Path("model_repository") / f"prefill_{arguments.task}" / "1", arguments.lora, arguments.threads,
                  arguments.opset, rounds=arguments.rounds)
    for name, row in made["ms"].items():
        print(f"{name:14} " + "  ".join(f"{n}: {ms:7.1f} ms" for n, ms in row.items()) + f"  {made['own_memory_mb'][name]:.0f} MB of its own")
    for name, row in made["times_as_fast_as_torch"].items():
        print(f"{name} against torch: " + ", ".join(f"{n}: {ratio}x" for n, ratio in row.items()))
    write_result(arguments.out, made)


if __name__ == "__main__":
    main()
