"""`sun setup`, `sun base` and `sun data`: what happens before serving."""

from __future__ import annotations

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
    source: Annotated[str, typer.Argument(
        help="smollm2 (it comes along), a folder with a Hugging Face checkpoint, or a hub id; with dummy a config.json, its folder, llama-3.1-8b or qwen3-8b.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)] = None,
    system_prompt: Annotated[str | None, typer.Option(
        help="System message of conversations without one; '' for an empty one. Default: the template's own.", show_default=False)] = None,
    load_format: Annotated[str, typer.Option(help="auto: the source's weights. dummy: random ones of its configuration, for timing.")] = "auto",
    seed: Annotated[int | None, typer.Option(min=0, help="Of dummy's weights. Default: 0.", show_default=False)] = None,
    root: RootOption = None,
) -> None:
    """Lay out another base model. Tasks tuned on the one before no longer fit; `sun base smollm2` brings that one back."""
    from sun.router.tasks import TaskRegistry
    from sun_client import show
    from sun_client.root import Root

    place = Root.find(root)
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"--load-format: got {load_format!r}, expected auto or dummy")
    random = load_format == "dummy"
    if random and revision is not None:
        raise ValueError("--revision: is for hub ids; with --load-format dummy the configuration is a file here")
    if not random and seed is not None:
        raise ValueError("--seed: is of random weights; it needs --load-format dummy")
    # Taken for a hub id, a mistyped folder would give an error about hub ids.
    if not random and source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ValueError(f"there is no folder {source}")
    started = time.monotonic()
    with show.working(f"laying out {source} in {place.base}"), show.quiet_libraries():
        from sun.text.prompt import PromptSettings
        from sun_build.base import build_base
        from sun_build.dummy import build_dummy

        prompt = PromptSettings(system_prompt)
        manifest = build_dummy(source, place.base, prompt, seed or 0) if random else build_base(source, place.base, prompt, revision)
    print(f"base: {manifest.source}, {manifest.architecture}, {manifest.digest[:19]}, in {time.monotonic() - started:.0f} s.")
    registry = TaskRegistry(place.models)
    other = [name for name in registry.names() if registry.get(name).base_digest != manifest.digest]
    if other:
        print(f"These tasks were made for another base and keep the server from starting; tune or remove them: {', '.join(other)}.")


def data(
    name: Annotated[str, typer.Argument(help="bfcl: tool calling, simple and multiple, from the bfcl-eval package.")],
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and test.jsonl.")],
) -> None:
    """Lay out a public data set as training and test conversations that share nothing."""
    if name != "bfcl":
        raise ValueError(f"name: got {name!r}, expected bfcl")
    from sun_build.bfcl_data import write

    train, test = write(out)
    print(f"{out}: {train} conversations to train on, {test} to test on; no function is in both.")
