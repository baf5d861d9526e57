"""What the accuracy table compares: its tasks (columns), its rows, and the settings that all rows of a column share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sun_build.contestants import Contestant
from sun_build.tune.settings import TuneSettings

SCHEME = "int4"
"""Decode module of the QSUN rows."""
HELD_OUT = 96
"""Training examples kept out to choose the best checkpoint by."""


@dataclass(frozen=True)
class Task:
    """A column. metric: its score; also: other metrics worth a look. limit: test examples. settings: shared by all rows."""

    name: str
    metric: str
    limit: int
    settings: TuneSettings
    also: tuple[str, ...] = ()
    max_tokens: int = 96


def _settings(steps: int, batch: int = 16) -> TuneSettings:
    return TuneSettings(steps=steps, batch=batch, eval_every=steps // 3)


TASKS = {task.name: task for task in (
    Task("banking", "intent", 500, _settings(300)),
    Task("math", "math", 329, _settings(240)),
    Task("bash", "bash", 400, _settings(240), also=("flags", "utility")),
    Task("bfcl", "bfcl", 200, _settings(150, batch=8)),
)}

# Learning rates are written out, so that a change of a default does not change the table.
FULL_LR, ALL_LR, LORA_LR = 4e-4, 1e-3, 2e-3
LORA_RANK = 64

TRAININGS = {
    "full": {"method": "full", "adapter": "none", "lr": FULL_LR},
    "sun_lora": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK, "lr": LORA_LR},
    "sun_all": {"adapter": "none", "lr": ALL_LR},
    "qsun_retuned": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK, "lr": LORA_LR, "decode": SCHEME},
}
"""What is trained: the settings that differ from the task's."""


@dataclass(frozen=True)
class Row:
    """A row. weights: which training fills its prefill, None for the base's; own: it decodes with those too; scheme: of its decode module."""

    name: str
    title: str
    weights: str | None
    own: bool = False
    scheme: str = "fp32"

    def contestant(self, runs: Path) -> Contestant:
        """As `sun_build.evaluate` takes it; ``runs`` holds a folder per training."""
        prefill = None if self.weights is None else runs / self.weights
        return Contestant(self.name, prefill, prefill if self.own else None, self.scheme)


ROWS = {row.name: row for row in (
    Row("base", "base model, untouched", None),
    Row("full", "full fine-tuning, decode of its own", "full", own=True),
    Row("naive", "naive: those weights as prefill, base decode", "full"),
    Row("sun_lora", f"SUN, LoRA (rank {LORA_RANK})", "sun_lora"),
    Row("sun_all", "SUN, all prefill weights", "sun_all"),
    Row("qsun", f"QSUN, the SUN LoRA with {SCHEME} decode", "sun_lora", scheme=SCHEME),
    Row("qsun_retuned", f"QSUN, LoRA re-tuned with {SCHEME} decode", "qsun_retuned", scheme=SCHEME),
)}


def training(task: Task, weights: str) -> TuneSettings:
    """Settings of one of `TRAININGS` on a task."""
    return replace(task.settings, **TRAININGS[weights])
