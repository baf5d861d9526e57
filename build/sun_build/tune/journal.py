"""What a tuning run says while it runs: a line per step in `steps.jsonl`, a report to whoever watches, and a loss curve at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

STEPS_FILE = "steps.jsonl"
CURVE_FILE = "loss.png"

Report = Callable[[int, float, float], None]
"""report(step, loss, tokens per second)."""


class Journal(TrainerCallback):
    """Writes `steps.jsonl`: {"step", "loss", "lr", "grad_norm", "tokens_per_s"} a step, {"step", "held_out_loss"} an evaluation.

    tokens: gives the number of tokens that the run has seen.
    """

    def __init__(self, out: Path, tokens: Callable[[], int], report: Report):
        self.path, self.tokens, self.report = out / STEPS_FILE, tokens, report
        self.before, self.at = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Forget the steps after the one that the run goes on from: they will be taken again."""
        self.at = time.perf_counter()
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_steps(self.path) if row["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs) -> None:
        """Write a step's or an evaluation's line."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._write({"step": state.global_step, "held_out_loss": round(logs["eval_loss"], 6)})
            self.at = time.perf_counter()
        elif "loss" in logs:
            now, seen = time.perf_counter(), self.tokens()
            rate = (seen - self.before) / (now - self.at)
            self.before, self.at = seen, now
            self._write({"step": state.global_step, "loss": round(logs["loss"], 6), "lr": logs.get("learning_rate"),
                         "grad_norm": round(logs.get("grad_norm", 0.0), 4), "tokens_per_s": round(rate)})
            self.report(state.global_step, logs["loss"], rate)

    def _write(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_steps(path: Path) -> list[dict]:
    """The lines of a `steps.jsonl`; none if there is no such file. A last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw(out: Path, title: str) -> Path:
    """Plot a run's losses, training (each step and their running mean) and held-out, to ``out/loss.png``; returns the path."""
    from matplotlib.figure import Figure

    rows = read_steps(out / STEPS_FILE)
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held = [(r["step"], r["held_out_loss"]) for r in rows if "held_out_loss" in r]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="training, each step")
        axes.plot(steps, running_mean(losses, 20), color="#1f4e9c", label="training, mean of 20 steps")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="#c8501e", markersize=3, label="held out")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy per response token (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / CURVE_FILE, dpi=120)
    return out / CURVE_FILE


def running_mean(values: tuple[float, ...], window: int) -> list[float]:
    """Mean of each value and up to ``window`` - 1 before it."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
