"""`sun eval`: how often a task is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sun_client.cli_options import RootOption


def evaluate(
    task: Annotated[str, typer.Option(help="A task of the model repository.")],
    data: Annotated[Path, typer.Option(help='Test conversations, one JSON per line: {"messages": [...]}; the last turn is the reference.')],
    metric: Annotated[str | None, typer.Option(help="exact, intent, bash, utility or math. Default: the task's.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Also write every example's answer to this JSONL file.", show_default=False)] = None,
    root: RootOption = None,
) -> None:
    """Score a task on test data, greedily, with the engine that serves but without a server."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from sun.router.tasks import TaskRegistry
    from sun_client import show
    from sun_client.root import Root

    place = Root.find(root)
    registry = TaskRegistry(place.models)
    if task not in registry.names():
        raise ValueError(f"--task: there is no task {task!r}; the tasks here are {', '.join(registry.names()) or 'none'}")
    metric = metric or registry.get(task).metric.get("name")
    if metric is None:
        raise ValueError(f"--metric: task {task} names none; give one")
    if not data.is_file():
        raise ValueError(f"--data: there is no file {data}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with show.quiet_libraries(), Progress(*columns, console=show.console, disable=not show.console.is_terminal) as progress:
        bar = progress.add_task(f"scoring {task}", total=limit)
        from sun_build.evaluate import evaluate as score

        scored = score(place.models, place.base, task, data, metric, limit, report=lambda done, total: progress.update(bar, completed=done, total=total))
    if out is not None:
        rows = [{"prompt": s.prompt, "answer": s.answer, "reference": s.reference, "right": s.right} for s in scored]
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    right = sum(s.right for s in scored)
    print(f"{task}: {metric} {right / len(scored):.3f} ({right} of {len(scored)})")
