"""What narrows the gap between SUN and full fine-tuning: short runs on banking, one change each, by their held-out loss.

`python -m sun_perf.accuracy_study --data DIR` goes on where an earlier run ended. The teacher of the distilled runs is the full
fine-tune of `make accuracy`, which is trained first if it is not there: half an hour more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from sun_build.tune.settings import TuneSettings
from sun_perf.accuracy import BASE, RUNS, one_thread, train
from sun_perf.accuracy_plan import HELD_OUT, TASKS
from sun_perf.machine import machine
from sun_perf.results import RESULTS, write_result

STEPS = 40
TASK, TEACHER = "banking", "full"
"""Of `accuracy_plan`: the task, and the training whose weights the distilled runs learn from."""


def lora(rank: int, lr: float = 2e-3, steps: int = STEPS, **more) -> TuneSettings:
    """A short run with an adapter."""
    return TuneSettings(rank=rank, alpha=2 * rank, lr=lr, steps=steps, eval_every=steps, **more)


def weights(lr: float, steps: int = STEPS, **more) -> TuneSettings:
    """A short run of all weights."""
    return TuneSettings(adapter="none", lr=lr, steps=steps, eval_every=steps, **more)


LONGER = "SUN, LoRA 64, steps of a quarter, 17 more prompt tokens before the answer"

STUDY: dict[str, TuneSettings] = {
    "full, all weights, lr 1e-4": weights(1e-4, method="full"),
    "full, all weights, lr 4e-4": weights(4e-4, method="full"),
    "SUN, all weights, lr 1e-4": weights(1e-4),
    "SUN, all weights, lr 4e-4": weights(4e-4),
    "SUN, all weights, lr 1e-3": weights(1e-3),
    "SUN, all weights, lr 2e-3": weights(2e-3),
    "SUN, LoRA 8": lora(8),
    "SUN, LoRA 16": lora(16),
    "SUN, LoRA 32": lora(32),
    "SUN, LoRA 64": lora(64),
    "SUN, LoRA 32, lr 5e-3": lora(32, 5e-3),
    "SUN, LoRA 64, lr 5e-3": lora(64, 5e-3),
    "SUN, LoRA 64, twice the steps of half the examples": lora(64, steps=2 * STEPS, batch=8),
    "SUN, LoRA 64, four times the steps of a quarter": lora(64, steps=4 * STEPS, batch=4),
    "SUN, LoRA 64, steps of a quarter, lr 1e-3": lora(64, 1e-3, steps=4 * STEPS, batch=4),
    "SUN, all weights, steps of a quarter, lr 1e-3": weights(1e-3, 4 * STEPS, batch=4),
    "SUN, all weights, steps of a quarter, lr 5e-4": weights(5e-4, 4 * STEPS, batch=4),
    "full, all weights, steps of a quarter, lr 4e-4": weights(4e-4, 4 * STEPS, batch=4, method="full"),
    "full, all weights, steps of a quarter, lr 2e-4": weights(2e-4, 4 * STEPS, batch=4, method="full"),
    "SUN, LoRA 64, K and V at 4 times the rate": lora(64, kv_lr=4.0),
    LONGER: lora(64, steps=4 * STEPS, batch=4, precision="bf16"),
    "SUN, LoRA 64, fifteen times the steps of a quarter": lora(64, steps=15 * STEPS, batch=4, precision="bf16"),
    "SUN, LoRA 64, fifteen times the steps of a quarter, lr 5e-4": lora(64, 5e-4, steps=15 * STEPS, batch=4, precision="bf16"),
    "SUN, all weights, fifteen times the steps of a quarter, lr 1e-3": weights(1e-3, 15 * STEPS, batch=4, precision="bf16"),
    "SUN, all weights, fifteen times the steps of a quarter, lr 3e-4": weights(3e-4, 15 * STEPS, batch=4, precision="bf16"),
    "SUN, LoRA 64, half the loss from the full fine-tune": lora(64, distill=0.5),
    "SUN, LoRA 64, all of the loss from it": lora(64, distill=1.0),
}

TAIL = {LONGER: "\n\nWhich intent does this question of a bank's customer have? Answer with its label."}
"""Runs whose user messages end with a text: K and V of more positions that have seen the whole question, and a place for the answer's plan."""


def with_tail(data: Path, text: str, out: Path) -> Path:
    """A copy of chat JSONL in which every user message ends with ``text``."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for message in (message for row in rows for message in row["messages"] if message["role"] == "user"):
        message["content"] += text
    out.write_text("\n".join(map(json.dumps, rows)))
    return out


def make_teacher(names: list[str], data: Path) -> None:
    """Train the teacher that some of these runs learn from, unless none does or it is there."""
    if any(STUDY[name].distill for name in names):
        train(TASKS[TASK], TEACHER, data)


def run(name: str, data: Path) -> float:
    """Held-out loss of one run."""
    from sun.model.manifest import BaseManifest
    from sun_client.tuning import Tuning

    settings = STUDY[name]
    teacher = RUNS / TASK / TEACHER if settings.distill else None
    with tempfile.TemporaryDirectory() as out:
        source = data / TASK / "train.jsonl"
        if name in TAIL:
            source = with_tail(source, TAIL[name], Path(out) / "train.jsonl")
        tuning = Tuning(TASK, BASE, BaseManifest.load(BASE), str(source), Path(out) / "run", None, settings, teacher)
        rows, held_out, _ = tuning.read(HELD_OUT)
        return tuning.train(rows, held_out)["held_out_loss"]


def main() -> None:
    """Make what is missing of `results/accuracy_study.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of banking/ with train.jsonl")
    parser.add_argument("--only", nargs="*", choices=STUDY, default=list(STUDY), help="runs to make (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs made at once, a CPU thread each")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run(args.only[0], args.data)))
        return
    path = RESULTS / "accuracy_study.json"

    def make(name: str) -> tuple[str, float]:
        command = [sys.executable, "-m", "sun_perf.accuracy_study", "--here", "--data", str(args.data), "--only", name]
        made = subprocess.run(command, env=one_thread(), stdout=subprocess.PIPE, check=True, text=True)
        return name, json.loads(made.stdout.splitlines()[-1])

    known = json.loads(path.read_text()) if path.is_file() else {}
    missing = [name for name in args.only if name not in known or TuneSettings(**known[name]["settings"]) != STUDY[name]]
    make_teacher(missing, args.data)  # here, since the runs below would each train it
    with ThreadPoolExecutor(args.jobs) as pool:
        for run_made in as_completed([pool.submit(make, name) for name in missing]):
            name, loss = run_made.result()
            print(f"{name}: held-out loss {loss}", flush=True)
            known[name] = {"held_out_loss": loss, "settings": asdict(STUDY[name]), "machine": machine()}
            write_result(path, known)


if __name__ == "__main__":
    main()
