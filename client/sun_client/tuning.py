"""A tuning run as a person sees it: the data's check, a bar while it trains, a card beside the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sun.model.manifest import BaseManifest
from sun.text.prompt import PromptFormat
from sun_client.show import console

if TYPE_CHECKING:
    from sun_build.tune.data import Example
    from sun_build.tune.settings import TuneSettings

PEFT = "library_name: peft\ntags: [lora, sun-prefill]\n"
CARD = """\
---
base_model: {source}
library_name: peft
tags: [lora, sun-prefill]
---

# {task}

{what}

| | |
|---|---|
| base | {source}, {digest} |
| data | {data}, {examples} examples |
| loss | {train_loss} on the last 20 training steps, {held_out_loss} on held-out examples |
| settings | {settings} |
"""
WHAT = {
    "adapter": """\
A LoRA adapter of the **prefill module** only (SUN): the prompt's tokens run with it, the answer's with the base as it is.
It is served by SUN on Triton (`sun task add {task} --weights <this folder>`). Put on the whole model it is another model.""",
    "prefill": """\
A **prefill module** (SUN): the prompt's tokens run with these weights, the answer's with the base as it is.
It is served by SUN on Triton (`sun task add {task} --weights <this folder>`). Used as a whole model it is another model.""",
    "full": """\
An ordinary fine-tune of the whole model: the baseline that a prefill module is held against (`sun eval --full <this folder>`).""",
}
PLAIN_EVERY = 10
"""Steps between lines where there is no terminal."""


@dataclass(frozen=True)
class Tuning:
    """One run.

    data: a file, or a hub dataset's id. metric: what the task is scored by, if it is known. teacher: a checkpoint to distil from.
    settings: a `sun_build.tune.settings.TuneSettings`. start: a folder of weights to begin with in place of the base's.
    """

    task: str
    base_dir: Path
    base: BaseManifest
    data: str
    out: Path
    metric: str | None
    settings: TuneSettings
    teacher: Path | None = None
    start: Path | None = None

    def read(self, held_out: int) -> tuple[list[Example], list[Example], int]:
        """Examples to train on, the last ``held_out`` to keep out, and how many were too long.

        A conversation's turns are all kept out, which may make it more, or none: the prompts of later ones hold the earlier ones' answers.
        Raises ValueError naming the line at fault, or if nothing is left to train on.
        """
        from sun_build.tune.data import examples, read_conversations

        prompts = PromptFormat.load(self.base_dir, self.base.prompt)
        found = [examples([c], prompts, self.base.vocab, self.settings.max_tokens) for c in read_conversations(self.data)]
        cut, kept_out = len(found), []
        while cut and len(kept_out) < held_out:
            cut -= 1
            kept_out = found[cut][0] + kept_out
        rows = [row for kept, _ in found[:cut] for row in kept]
        if not rows:
            raise ValueError(f"{self.data}: {len(kept_out)} examples fit into max_tokens and the last {held_out}, by whole conversations, are held out; "
                             "none is left to train on")
        return rows, kept_out, sum(left_out for _, left_out in found)

    def train(self, rows: list[Example], held_out: list[Example], resume: bool = False, overwrite: bool = False,
              tensorboard: bool = False) -> dict | None:
        """Train with a bar (without a terminal: a line every ten steps), write `task.json` and the card; returns what the card says.

        None if the run was interrupted and can be resumed.
        """
        steps = self.settings.steps
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        # The bar begins before the imports and the first step, which take seconds.
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("tuning", total=steps, loss="-", rate="-")

            def report(step: int, loss: float, rate: float) -> None:
                progress.update(bar, completed=step, loss=f"{loss:.3f}", rate=f"{rate:.0f}")
                if progress.disable and (step % PLAIN_EVERY == 0 or step in (1, steps)):
                    print(f"step {step} of {steps}: loss {loss:.3f}, {rate:.0f} tokens/s", flush=True)

            from sun_build.tasks import describe_weights
            from sun_build.tune.run import is_main, tune

            result = tune(self.base_dir, rows, held_out, self.out, self.settings, self.teacher, self.start, resume, overwrite, tensorboard, report)
        if result is not None and is_main():
            describe_weights(self.base_dir, self.out, self.task, {"temperature": 0}, {"name": self.metric} if self.metric else {},
                             self.settings.whole_prompt)
            self._write_card(result)
        return result

    def _write_card(self, result: dict) -> None:
        """`README.md`, over the empty template that peft writes."""
        settings = self.settings
        kind = "full" if settings.method == "full" else {"lora": "adapter", "none": "prefill"}[settings.adapter]
        said = {**result, "steps": f"{result['steps']} of {settings.steps}"} if result["steps"] < settings.steps else result
        names = ["method", "whole_prompt", "adapter", "decode", "steps", "batch", "accumulate", "lr", "schedule", "warmup", "clip", "max_tokens", "distill", "precision", "seed"]
        names += ["rank", "alpha", "dropout", "export_rank"] if settings.adapter == "lora" else []
        values = {"task": self.task, "what": WHAT[kind].format(task=self.task), "source": self.base.source, "digest": self.base.digest, "data": Path(self.data).name, **result}
        started = [] if self.start is None else [f"start {self.start.resolve().name}"]
        values["settings"] = ", ".join([*(f"{name} {said[name]}" for name in names), *started])
        (self.out / "README.md").write_text((CARD if kind == "adapter" else CARD.replace(PEFT, "")).format(**values))
