"""What the accuracy table compares: its tasks (columns), its rows, and the settings that all rows of a column share."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec

from sun.model.loading import task_digest
from sun.model.manifest import TaskManifest, write_manifest
from sun.model.weights import ADAPTER_FILES
from sun_build.contestants import Contestant
from sun_build.tune.settings import TuneSettings, fast_precision
from sun_build.tune.shrink import shrink_adapter

SCHEME = "int4"
"""Decode module of the QSUN rows."""
HELD_OUT = 96
"""Training examples kept out to choose the best checkpoint by."""


@dataclass(frozen=True)
class Task:
    """A column. metric: its score; also: other metrics worth a look. limit: test examples. settings: shared by all rows.

    max_tokens: of an answer, well above the longest reference; it only spares the time of answers that ramble on. data: its folder, if not called
    like the column. rates: learning rates that differ from those of `TRAININGS`, for steps of few examples.
    """

    name: str
    metric: str
    limit: int
    settings: TuneSettings
    also: tuple[str, ...] = ()
    max_tokens: int = 96
    data: str = ""
    rates: dict[str, float] = field(default_factory=dict)

    def file(self, data: Path, name: str) -> Path:
        """One of its files (train.jsonl, test.jsonl) in the folder of all tasks' data."""
        return data / (self.data or self.name) / name


def _settings(steps: int, batch: int, precision: str = "fp32") -> TuneSettings:
    return TuneSettings(steps=steps, batch=batch, eval_every=steps // 3, precision=precision)


SMALL_STEPS = {"sun_lora": 5e-4, "sun_all": 4e-4, "sun_whole": 5e-4, "qsun_retuned": 5e-4}
"""Learning rates for steps of four examples, where those of `TRAININGS` cost SUN five points on banking (accuracy.md)."""

TASKS = {task.name: task for task in (
    Task("banking", "intent", 500, _settings(300, 16), max_tokens=24),
    Task("banking_2400", "intent", 500, _settings(2400, 4, "bf16"), max_tokens=24, data="banking", rates=SMALL_STEPS),
    Task("banking_twice", "intent", 3074, TuneSettings(steps=2400, batch=8, eval_every=400, precision="bf16"), max_tokens=24, data="banking",
         rates={"sun_lora": 3e-4, "sun_all": 4e-4, "sun_whole": 3e-4, "qsun_retuned": 3e-4}),
    Task("math", "math", 329, _settings(660, 4, "bf16"), max_tokens=64, rates=SMALL_STEPS),
    Task("math_again", "math", 329, replace(_settings(660, 4, "bf16"), seed=1), max_tokens=64, data="math", rates=SMALL_STEPS),
    Task("bash", "bash", 400, _settings(240, 8), also=("flags", "utility")),
    Task("bash_1400", "bash", 400, _settings(1400, 4, "bf16"), also=("flags", "utility"), data="bash", rates=SMALL_STEPS),
    Task("bfcl", "bfcl", 200, _settings(150, 6)),
    Task("bfcl_again", "bfcl", 200, replace(_settings(150, 6), seed=1), data="bfcl"),
)}

# Learning rates are written out, so that a change of a default does not change the table.
FULL_LR, ALL_LR, LORA_LR = 4e-4, 1e-3, 2e-3
LORA_RANK = 64
SHIPPED_RANK = 12
"""Rank of the adapters that come with the repository: up to 7.4 MB each, where git takes 8."""

TRAININGS = {
    "full": {"method": "full", "adapter": "none", "lr": FULL_LR},
    "sun_lora": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK, "lr": LORA_LR},
    "sun_all": {"adapter": "none", "lr": ALL_LR},
    "sun_whole": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK, "lr": LORA_LR, "whole_prompt": True},
    "qsun_retuned": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK, "lr": LORA_LR, "decode": SCHEME},
    "qsun_further": {"decode": SCHEME},
    "qsun_whole_further": {"decode": SCHEME},
}
"""What is trained: the settings that differ from the task's, or, of those in `STARTS`, from what they start with."""
STARTS = {"qsun_further": "sun_lora", "qsun_whole_further": "sun_whole"}
"""Trainings that go on with another's weights."""
FURTHER = 4
"""Such a training has a fourth of the other's steps and a fourth of its peak rate."""


@dataclass(frozen=True)
class Row:
    """A row.

    weights: which training fills its prefill, None for the base's; cut: rank that its adapter is cut down to; own: it decodes
    with those weights too; scheme: of its decode module.
    """

    name: str
    title: str
    weights: str | None
    own: bool = False
    scheme: str = "fp32"
    cut: int | None = None

    def contestant(self, runs: Path) -> Contestant:
        """As `sun_build.evaluate` takes it; ``runs`` holds a folder per training."""
        prefill = None if self.weights is None else runs / self.weights
        if prefill is not None and self.cut is not None:
            prefill = cut_down(prefill, self.cut)
        return Contestant(self.name, prefill, prefill if self.own else None, self.scheme)


def cut_down(adapter: Path, rank: int) -> Path:
    """A copy of an adapter at a lower rank, beside it, which says of itself what the adapter does: whether it runs all of a prompt, say."""
    made = adapter.with_name(f"{adapter.name}_{rank}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, made / name)
    shrink_adapter(made, rank)
    write_manifest(made, msgspec.structs.replace(TaskManifest.load(adapter), weights_digest=task_digest(made, "lora")))
    return made


ROWS = {row.name: row for row in (
    Row("base", "base model, untouched", None),
    Row("full", "full fine-tuning, decode of its own", "full", own=True),
    Row("naive", "naive: those weights as prefill, base decode", "full"),
    Row("sun_lora", f"SUN, LoRA (rank {LORA_RANK})", "sun_lora"),
    Row("sun_cut", f"SUN, that LoRA cut down to rank {SHIPPED_RANK}", "sun_lora", cut=SHIPPED_RANK),
    Row("sun_all", "SUN, all prefill weights", "sun_all"),
    Row("sun_whole", f"SUN, LoRA (rank {LORA_RANK}) of whole prompts", "sun_whole"),
    Row("sun_whole_cut", f"SUN, that LoRA of whole prompts cut down to rank {SHIPPED_RANK}", "sun_whole", cut=SHIPPED_RANK),
    Row("qsun", f"QSUN, the SUN LoRA with {SCHEME} decode", "sun_lora", scheme=SCHEME),
    Row("qsun_int8", f"QSUN, the adapter of rank {SHIPPED_RANK} with int8 decode", "sun_lora", scheme="int8", cut=SHIPPED_RANK),
    Row("qsun_whole", f"QSUN, the LoRA of whole prompts with {SCHEME} decode", "sun_whole", scheme=SCHEME),
    Row("qsun_whole_int8", f"QSUN, the adapter of whole prompts of rank {SHIPPED_RANK} with int8 decode", "sun_whole", scheme="int8", cut=SHIPPED_RANK),
    Row("qsun_retuned", f"QSUN, LoRA re-tuned from the base with {SCHEME} decode", "qsun_retuned", scheme=SCHEME),
    Row("qsun_further", f"QSUN, the SUN LoRA tuned further with {SCHEME} decode", "qsun_further", scheme=SCHEME),
    Row("qsun_whole_further", f"QSUN, the LoRA of whole prompts tuned further with {SCHEME} decode", "qsun_whole_further", scheme=SCHEME),
)}


def training(task: Task, weights: str) -> TuneSettings:
    """Settings of one of `TRAININGS` on a task; in float32, which is no less exact, where this machine is no faster in bfloat16."""
    if weights in STARTS:
        first = training(task, STARTS[weights])
        steps = max(1, first.steps // FURTHER)
        return replace(first, lr=first.lr / FURTHER, steps=steps, eval_every=steps, **TRAININGS[weights])
    made = replace(task.settings, **TRAININGS[weights])
    precision = made.precision if made.precision == "fp32" else fast_precision()
    return replace(made, lr=task.rates.get(weights, made.lr), precision=precision)


def compares(settings: TuneSettings, other: TuneSettings) -> bool:
    """Whether two trainings differ in nothing that a score depends on: the precision of their products is none."""
    return not settings.differences(replace(other, precision=settings.precision))


def settings_of(task: Task, row: Row) -> dict:
    """Everything that a row's score depends on, besides code and data."""
    tuned = None if row.weights is None else asdict(training(task, row.weights))
    return {"training": tuned, "held_out": HELD_OUT, "own": row.own, "scheme": row.scheme, "cut": row.cut,
            "start": STARTS.get(row.weights), "limit": task.limit, "metric": task.metric}


def fits(result: dict, task: Task, row: Row) -> bool:
    """Whether a result is of these settings, in any precision; settings that it was written without have their defaults."""
    made, wanted = {"cut": None, "start": None, **result["settings"]}, settings_of(task, row)
    one, other = made.pop("training"), wanted.pop("training")
    return made == wanted and (one == other if None in (one, other) else compares(TuneSettings(**one), TuneSettings(**other)))
