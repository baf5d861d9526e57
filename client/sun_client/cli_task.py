"""`sun task`: the tasks of a model repository."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from sun_client.cli_options import RootOption

app = typer.Typer(no_args_is_help=True, help="Add, remove and list the tasks of the model repository.")


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="What clients will call it: a-z, 0-9, _ and -.")],
    weights: Annotated[Path | None, typer.Option(
        help="Folder with a LoRA adapter (peft) or a full checkpoint. Default: the base's own weights.", show_default=False)] = None,
    root: RootOption = None,
) -> None:
    """Put a task into the model repository, or replace it, and have a running server serve it.

    A task.json beside the weights (`sun tune` writes one) must fit the base. Requests of a replaced task that have begun end with the old weights.
    What a running server cannot load is taken back: the task is then as it was before.
    """
    from sun.router.tasks import TaskRegistry
    from sun_client import show
    from sun_client.errors import ServerError
    from sun_client.root import Root

    place = Root.find(root)
    if weights is not None and not weights.is_dir():
        raise ValueError(f"--weights: {weights} is not a folder")
    update, models = name in TaskRegistry(place.models).names(), (f"prefill_{name}", name)
    try:
        with ExitStack() as placed:
            with show.working(f"adding task {name}"):
                from sun_build.tasks import placed_task

                manifest = placed.enter_context(placed_task(place.models, place.base, name, weights))
            show.load(place.path, name, *models)
    except ServerError as error:
        _serve_as_before(place.path, update, *models)
        raise ServerError(f"{error}; {name} {'is as it was before, files and answers' if update else 'was not added'}") from error
    except KeyboardInterrupt:
        _serve_as_before(place.path, update, *models)
        raise
    print(f"{name}: added with {manifest.weights} weights {manifest.weights_digest[:19]}.")


def _serve_as_before(root: Path, update: bool, *models: str) -> None:
    """Have the servers that run now take a task's models as they are on disk again, or forget them: some may have taken what was there meanwhile."""
    from sun_client import show
    from sun_client.control import Control
    from sun_client.errors import ServerError

    with show.working("putting back what was there"):
        for control in Control.running(root):
            for model in models if update else reversed(models):
                with suppress(ServerError):  # one that refuses still has what it had
                    (control.load if update else control.unload)(model)


@app.command("remove")
def remove(name: Annotated[str, typer.Argument(help="The task's name.")], root: RootOption = None) -> None:
    """Delete a task and its weights from the model repository; a running server forgets it once its requests have ended."""
    from sun_client import show
    from sun_client.control import Control
    from sun_client.root import Root

    place = Root.find(root)
    with show.working(f"removing task {name}"):
        from sun.prefill.exported import kv_model
        from sun_build.task_entries import check_known, remove_task

        check_known(place.models, name)
        exported = [kv_model(name)] if (place.models / kv_model(name)).is_dir() else []
        for control in Control.running(place.path):
            control.unload(name, f"prefill_{name}", *exported)
        remove_task(place.models, name)
    print(f"{name}: removed.")


@app.command("list")
def list_tasks(root: RootOption = None) -> None:
    """List the tasks, their weights and what they score."""
    from rich.table import Table

    from sun.router.tasks import TaskRegistry
    from sun_client import show
    from sun_client.root import Root

    place = Root.find(root)
    registry = TaskRegistry(place.models)
    if not registry.names():
        print("There are no tasks yet: `sun setup` adds the shipped ones, `sun task add` your own.")
        return
    digest = place.manifest().digest
    table = Table("task", "weights", "digest", "fits the base", "sampling", "metric")
    for task in map(registry.get, registry.names()):
        pairs = [", ".join(f"{key} {value}" for key, value in values.items()) for values in (task.sampling, task.metric)]
        table.add_row(task.name, task.weights, task.weights_digest[:19], "yes" if task.base_digest == digest else "no", *pairs)
    show.console.print(table)
