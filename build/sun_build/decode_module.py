"""Whether a decode module and a repository's tasks are of one base."""

from __future__ import annotations

from pathlib import Path

from sun.model.manifest import BaseManifest
from sun.router.tasks import TaskRegistry
from sun_build.base import checkpoint_digest


def check_tasks(repository: Path, base_dir: Path, weights: Path | None = None) -> None:
    """Raise ValueError naming both digests if a decode module is not of the base that a task's manifest names.

    weights: a checkpoint to decode with; None for the base's own.
    """
    digest = BaseManifest.load(base_dir).digest if weights is None else checkpoint_digest(weights)
    registry = TaskRegistry(repository)
    for task in map(registry.get, registry.names()):
        if task.base_digest != digest:
            raise ValueError(f"the decode module in {weights or base_dir} is of base {digest}, but task {task.name!r} was made for base "
                             f"{task.base_digest}: tune the task for this one, or remove it")
