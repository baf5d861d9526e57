"""`sun tune`: a task's prefill module from its own data, or the ordinary fine-tune to hold it against."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sun_client.cli_options import RootOption


def tune(
    data: Annotated[str, typer.Option(
        help='Training data: JSONL of {"messages": [...]} or {"prompt", "completion"}, or a hub dataset (owner/name or owner/name:split).')],
    out: Annotated[Path, typer.Option(help="Folder for the weights, the log and the loss curve.")],
    task: Annotated[str | None, typer.Option(help="The task's name, for the card. Default: the folder's.", show_default=False)] = None,
    base: Annotated[Path | None, typer.Option(help="The base model's folder. Default: the root's build/base.", show_default=False)] = None,
    method: Annotated[str, typer.Option(help="sun: the prefill module, through the frozen decode module. full: one ordinary model, the baseline.")] = "sun",
    adapter: Annotated[str, typer.Option(help="lora, or none for all weights.")] = "lora",
    whole_prompt: Annotated[bool, typer.Option(
        "--whole-prompt", help="The prefill module runs the prompt's last token, too, and the first token is chosen from what it makes of it.")] = False,
    start: Annotated[Path | None, typer.Option(
        help="Begin with these weights (an earlier run's adapter or checkpoint) in place of the base's.", show_default=False)] = None,
    decode: Annotated[str, typer.Option(help="The frozen decode module as it will serve: fp32, bf16, int8, int4, nf4, bnb-int8 or bnb-nf4.")] = "fp32",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps. Default: 300.", show_default=False)] = None,
    epochs: Annotated[float | None, typer.Option(min=0.01, help="In place of --steps: how often to see all examples.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples that run together.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per optimiser step, on each device.")] = 1,
    rank: Annotated[int | None, typer.Option(min=1, help="LoRA rank; alpha is twice that. Default: 64, or that of the adapter to start from.", show_default=False)] = None,
    dropout: Annotated[float, typer.Option(min=0.0, help="Share of the adapter's inputs that are left out of a step, at random; for few examples seen often.")] = 0.0,
    export_rank: Annotated[int | None, typer.Option(
        min=1, help="Cut the trained adapter down to this rank, for a small file. perf/accuracy.md has what that cost three tasks.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Peak learning rate. Default: by method, adapter and examples a step.", show_default=False)] = None,
    kv_lr: Annotated[float, typer.Option(min=0.0, help="Factor on the rate of the K and V projections, whose outputs are handed over.")] = 1.0,
    schedule: Annotated[str, typer.Option(help="linear or cosine, after the warm-up.")] = "linear",
    warmup: Annotated[float, typer.Option(min=0.0, help="Share of the steps over which the rate rises.")] = 0.06,
    max_tokens: Annotated[int, typer.Option(
        min=2, help="Longer examples (prompt and answer, in tokens) are left out; an answer longer than this is an error.")] = 512,
    held_out: Annotated[int, typer.Option(
        min=0, help="Keep the last so many examples out of training, by whole conversations; the weights with the lowest loss on them are kept.")] = 0,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between looks at the held-out examples.")] = 50,
    patience: Annotated[int, typer.Option(min=0, help="Stop after so many looks without a lower loss; 0 never.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints (with held-out examples: eval-every).")] = 50,
    teacher: Annotated[Path | None, typer.Option(help="Learn from this fine-tuned checkpoint's distribution too.", show_default=False)] = None,
    distill: Annotated[float, typer.Option(
        min=0.0, max=1.0, help="The teacher's share of the loss. Default with a teacher: 0.5.", show_default=False)] = 0.0,
    checkpointing: Annotated[bool, typer.Option(
        "--checkpointing", help="Less memory, a third more time: recompute the prefill's activations.")] = False,
    precision: Annotated[str | None, typer.Option(
        help="Of the matrix products: fp32 or bf16. Default: bf16 where the machine has it (GPU, AMX, AVX-512 BF16).", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the weights' start and the data's order.")] = 0,
    metric: Annotated[str | None, typer.Option(help="What `sun eval` scores it by: exact, intent, bash, utility, flags, math, bfcl.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where there is a run.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log to TensorBoard too (pip install tensorboard).")] = False,
    root: RootOption = None,
) -> None:
    """Tune a prefill module for a task on your own data. The decode module stays as it is.

    Ctrl-C saves and ends; --resume goes on. Several devices: torchrun --nproc-per-node N -m sun_client.cli tune ...; a step is then N x batch x accumulate examples.
    """
    from sun.model.manifest import BaseManifest
    from sun_client import show, tuning
    from sun_client.root import Root

    base_dir = base if base is not None else Root.find(root).base
    manifest = BaseManifest.load(base_dir)
    for option, folder in (("--teacher", teacher), ("--start", start)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option}: there is no folder {folder}")
    with show.quiet_libraries():
        from sun_build.metrics import METRICS
        from sun_build.tune.batches import steps_in
        from sun_build.tune.run import is_main
        from sun_build.tune.settings import RANK, TuneSettings, devices, fast_precision
        from sun_build.tune.start import adapter_size

        if steps is not None and epochs is not None:
            raise ValueError("--epochs: takes the place of --steps; give one of them")
        if metric is not None and metric not in METRICS:
            raise ValueError(f"--metric: got {metric!r}, expected one of {', '.join(METRICS)}")
        size = None if start is None else adapter_size(start)
        rank = rank or (size[0] if size else RANK)
        alpha = size[1] if size and size[0] == rank else 2 * rank
        settings = TuneSettings(
            method=method, whole_prompt=whole_prompt, adapter=adapter, decode=decode, steps=steps or 300, batch=batch, accumulate=accumulate, rank=rank, alpha=alpha,
            dropout=dropout, export_rank=export_rank, lr=lr, kv_lr=kv_lr,
            schedule=schedule, warmup=warmup, max_tokens=max_tokens, eval_every=eval_every, patience=patience, save_every=save_every,
            distill=distill or (0.5 if teacher else 0.0), checkpointing=checkpointing, precision=precision or fast_precision(), seed=seed)
        name = task or out.resolve().name
        run = tuning.Tuning(name, base_dir, manifest, data, out, metric, settings, teacher, start)
        with show.working(f"reading {data}"):
            rows, kept_out, too_long = run.read(held_out)
        if too_long and is_main():
            print(f"{too_long} examples are left out: longer than {max_tokens} tokens.")
        if epochs is not None:
            run = replace(run, settings=replace(settings, steps=steps_in(epochs, len(rows), batch * accumulate * devices())))
        if is_main():
            print(f"Training on {len(rows)} examples" + (f", {len(kept_out)} held out." if kept_out else "."))
        result = run.train(rows, kept_out, resume, overwrite, tensorboard)
    if result is None:
        if is_main():
            print(f"Interrupted; the step is saved. --resume goes on with it in {os.path.relpath(out)}.")
        raise typer.Exit(130)
    if not is_main():
        return
    loss = f", held-out loss {result['held_out_loss']}" if kept_out else ""
    print(f"{name}: {result['steps']} steps, last training loss {result['train_loss']}{loss}. Curve: {os.path.relpath(out / 'loss.png')}")
    print(f"Next: sun task add {name} --weights {os.path.relpath(out)}" if method == "sun"
          else f"Next: sun eval --task TASK --data test.jsonl --against full,sun --full {os.path.relpath(out)}")
