"""transformers' Trainer around the two modules: it brings accumulation, precision, schedules, devices, checkpoints and resuming."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from sun_build.tune.batches import plan_batches
from sun_build.tune.data import Example
from sun_build.tune.loss import IGNORE, collate
from sun_build.tune.modules import TwoModules
from sun_build.tune.settings import TuneSettings
from sun_build.tune.stopping import Patience

CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"


class Planned(BatchSampler):
    """Batches known beforehand, as lists of indices."""

    def __init__(self, batches: list[list[int]], size: int):
        self.batches, self.batch_size, self.drop_last = batches, size, False

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class LookLast(TrainerCallback):
    """Evaluates after the last step too, which is often the best."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for it."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        return control


class HandoffTrainer(Trainer):
    """Trains `TwoModules`. A run is one epoch of planned batches, so a resumed run sees the very batches it would have seen."""

    def __init__(self, model: TwoModules, rows: list[Example], held_out: list[Example], out: Path, settings: TuneSettings,
                 tensorboard: bool, callbacks: list[TrainerCallback]):
        on_gpu = torch.cuda.is_available()
        if tensorboard:  # its default is beside the checkpoints, which go when the run has ended
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(out / TENSORBOARD))
        best = {"eval_strategy": "steps", "eval_steps": settings.eval_every, "load_best_model_at_end": True,
                "metric_for_best_model": "loss", "greater_is_better": False} if held_out else {}
        arguments = TrainingArguments(
            output_dir=str(out / CHECKPOINTS), max_steps=settings.steps, gradient_accumulation_steps=settings.accumulate,
            learning_rate=settings.peak_lr, lr_scheduler_type=settings.schedule, warmup_steps=int(settings.warmup * settings.steps),
            max_grad_norm=settings.clip, weight_decay=0.0, optim="adamw_torch_fused", bf16=settings.precision == "bf16", use_cpu=not on_gpu,
            ddp_backend="gloo" if not on_gpu and "WORLD_SIZE" in os.environ else None, seed=settings.seed,
            # The best checkpoint must have been saved, so with held-out examples both happen at the same steps.
            save_strategy="steps", save_steps=settings.eval_every if held_out else settings.save_every, save_total_limit=2,
            logging_steps=1, logging_nan_inf_filter=False, report_to=["tensorboard"] if tensorboard else [], disable_tqdm=True,
            remove_unused_columns=False, prediction_loss_only=True, label_names=["labels"], dataloader_pin_memory=on_gpu, **best)
        if held_out:
            callbacks = [*callbacks, LookLast()]
            callbacks += [Patience(settings.patience)] if settings.patience else []
        self._collate = partial(collate, whole_prompt=settings.whole_prompt)
        super().__init__(model=model, args=arguments, train_dataset=rows, eval_dataset=held_out or None, data_collator=self._collate, callbacks=callbacks)
        self.remove_callback(PrinterCallback)  # the journal says it all
        self.settings, self.tokens = settings, 0

    def get_train_dataloader(self) -> DataLoader:
        """All batches of the run; a step's examples are the same however they are split into batches to accumulate."""
        size, parts = self.settings.batch, self.settings.accumulate * self.args.world_size
        steps = plan_batches(self.train_dataset, size * parts, self.settings.steps, self.settings.seed)
        planned = [share for step in steps for share in split(step, parts)]
        return self.accelerator.prepare(self._loader(self.train_dataset, planned))

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """The held-out examples, by length; each device has its share of the batches."""
        rows = self.eval_dataset
        order, size = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt)), self.settings.batch
        planned = [order[i : i + size] for i in range(0, len(order), size)][self.args.process_index :: self.args.world_size]
        return self._loader(rows, planned)

    def _loader(self, rows: list[Example], planned: list[list[int]]) -> DataLoader:
        batches = Planned(planned, self.settings.batch)
        return DataLoader(rows, batch_sampler=batches, collate_fn=self._collate, pin_memory=self.args.dataloader_pin_memory)

    @torch.no_grad()
    def evaluation_loop(self, dataloader: DataLoader, description: str, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """The held-out loss per token, as training has it: whatever the batches are, and whichever devices they run on.

        Trainer's own is the mean of the batches' means, in which a short batch's tokens count for more, and a batch may count twice.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        found = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in map(self._prepare_inputs, dataloader):
            found += torch.stack((model(**inputs, num_items_in_batch=1)["loss"], (inputs["labels"] != IGNORE).sum()))
        loss, tokens = self.accelerator.reduce(found).tolist()
        return EvalLoopOutput(predictions=None, label_ids=None, metrics={f"{metric_key_prefix}_loss": loss / tokens}, num_samples=len(self.eval_dataset))

    def create_optimizer(self, model=None):
        """AdamW; the K and V projections have a learning rate of their own."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups: dict[bool, list] = {True: [], False: []}
        for name, parameter in self.model.learnt().items():
            groups["k_proj" in name or "v_proj" in name].append(parameter)
        factors = {True: self.settings.kv_lr, False: 1.0}
        self.optimizer = kind([{"params": p, "lr": options["lr"] * factors[kv]} for kv, p in groups.items() if p], **options)
        return self.optimizer

    def training_step(self, model, inputs: dict[str, Tensor], *args, **kwargs) -> Tensor:
        """As in Trainer; counts the tokens that ran."""
        self.tokens += int(inputs["mask"].sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.accelerator.unwrap_model(model or self.model).restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # One process writes checkpoints, and takes them away in the end: the others must find this one whole.
        self.accelerator.wait_for_everyone()
        self.accelerator.unwrap_model(self.model).restore(self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


def split(step: list[int], parts: int) -> list[list[int]]:
    """A step's examples in ``parts`` batches of about one size; with fewer examples than parts, some are used twice."""
    step = step * (-(-parts // len(step))) if len(step) < parts else step
    edges = [len(step) * i // parts for i in range(parts + 1)]
    return [step[a:b] for a, b in zip(edges, edges[1:], strict=False)]
