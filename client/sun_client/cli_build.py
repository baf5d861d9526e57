"""`sun setup`, `sun base` and `sun tune`: what happens before serving."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from sun_client.cli_options import RootOption


def setup(root: RootOption = None) -> None:
    """Prepare everything for `sun serve`: Triton, the base model and the shipped tasks. What is done already is left alone."""
    from sun_build.triton import install
    from sun_client import show
    from sun_client.root import Root
    from sun_client.shipped import EMBEDDED, base_to_do, shipped

    place = Root.find(root)
    install(place.path, Path(sys.prefix))
    tasks = shipped(place)
    reason = base_to_do(place)
    if reason is not None:
        with show.working(f"base: laying out {EMBEDDED}, because {reason}"), show.quiet_libraries():
            from sun.text.prompt import PromptSettings
            from sun_build.base import build_base

            build_base(EMBEDDED, place.base, tasks[0].manifest.prompt if tasks else PromptSettings())
    base = place.manifest()
    fitting = [task for task in tasks if task.fits(base)]
    added = [task for task in fitting if not task.current(place)]
    for task in added:
        with show.working(f"task {task.name}: adding it to {place.models}"), show.quiet_libraries():
            from sun_build.tasks import add_task

            add_task(place.models, place.base, task.name, task.folder)
    names = ", ".join(task.name for task in fitting) or "none"
    print(f"Ready: base {base.source} {base.digest[:19]}, shipped tasks {names} ({len(added)} added now).")
    if left := [task.name for task in tasks if task not in fitting]:
        print(f"Left out, tuned on {EMBEDDED} with its own prompts: {', '.join(left)}. `sun base {EMBEDDED}` brings that base back.")


def base(
    source: Annotated[str, typer.Argument(help="smollm2 (it comes along), a folder with a Hugging Face checkpoint, or a hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)] = None,
    system_prompt: Annotated[str | None, typer.Option(
        help="System message of conversations without one; '' for an empty one. Default: the template's own.", show_default=False)] = None,
    root: RootOption = None,
) -> None:
    """Lay out another base model. Tasks tuned on the one before no longer fit; `sun base smollm2` brings that one back."""
    from sun.router.tasks import TaskRegistry
    from sun_client import show
    from sun_client.root import Root

    place = Root.find(root)
    # Taken for a hub id, a mistyped folder would give an error about hub ids.
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ValueError(f"there is no folder {source}")
    started = time.monotonic()
    with show.working(f"laying out {source} in {place.base}"), show.quiet_libraries():
        from sun.text.prompt import PromptSettings
        from sun_build.base import build_base

        manifest = build_base(source, place.base, PromptSettings(system_prompt), revision)
    print(f"base: {manifest.source}, {manifest.architecture}, {manifest.digest[:19]}, in {time.monotonic() - started:.0f} s.")
    registry = TaskRegistry(place.models)
    other = [name for name in registry.names() if registry.get(name).base_digest != manifest.digest]
    if other:
        print(f"These tasks were made for another base and keep the server from starting; tune or remove them: {', '.join(other)}.")


def tune(
    task: Annotated[str, typer.Option(help="The task's name, for the adapter's card.")],
    data: Annotated[Path, typer.Option(help='Training conversations, one JSON per line: {"messages": [...]}.')],
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    base: Annotated[Path | None, typer.Option(help="The base model's folder. Default: the root's build/base.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank; alpha is twice that.")] = 12,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 2e-3,
    batch: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the weights' start and the data's order.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer examples (prompt and answer, in tokens) are left out.")] = 512,
    metric: Annotated[str | None, typer.Option(help="What `sun eval` scores it by: exact, intent, bash, utility, math.", show_default=False)] = None,
    held_out: Annotated[int, typer.Option(min=0, help="Keep the last so many examples out of training and report their loss.")] = 0,
    root: RootOption = None,
) -> None:
    """Tune a prefill module for a task on your own data. The decode module stays as it is."""
    from sun.model.manifest import BaseManifest
    from sun_build.metrics import METRICS
    from sun_client import show, tuning
    from sun_client.root import Root

    base_dir = base if base is not None else Root.find(root).base
    manifest = BaseManifest.load(base_dir)
    if not data.is_file():
        raise ValueError(f"--data: there is no file {data}")
    if metric is not None and metric not in METRICS:
        raise ValueError(f"--metric: got {metric!r}, expected one of {', '.join(METRICS)}")
    with show.quiet_libraries():
        run = tuning.Tuning(task, base_dir, manifest, data, out, metric, dict(
            steps=steps, rank=rank, alpha=2 * rank, lr=lr, batch=batch, seed=seed, max_tokens=max_tokens))
        with show.working(f"reading {data}"):
            rows, kept_out, too_long = run.read(held_out)
        if too_long:
            print(f"{too_long} examples are left out: longer than {max_tokens} tokens.")
        print(f"Training on {len(rows)} examples" + (f", {len(kept_out)} held out." if kept_out else "."))
        result = run.train(rows, kept_out)
    loss = f", held-out loss {result['held_out_loss']}" if kept_out else ""
    print(f"{task}: {steps} steps, last training loss {result['train_loss']}{loss}.")
    print(f"Next: sun task add {task} --weights {os.path.relpath(out)}")
