"""A task's entries in a model repository: their name, and their end. Imports no torch, which would take `sun task remove` seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

from sun.prefill.exported import kv_model
from sun.router.tasks import NAME, TaskRegistry

MODULES = ("prefill_", "decode_", kv_model(""))


def check_name(repository: Path, name: str) -> None:
    """Raise ValueError unless a task may be called ``name`` in this repository."""
    if NAME.fullmatch(name) is None:
        raise ValueError(f"name: {name[:64]!r} is not a task name; use up to 63 of a-z, 0-9, _ and -, a letter or digit first")
    if name.startswith(MODULES):
        raise ValueError(f"name: {name!r} must not begin with {', '.join(MODULES)}, the names of modules")
    if (repository / name).exists() and name not in TaskRegistry(repository).names():
        raise ValueError(f"name: {name!r} is taken by another model of this repository")


def check_known(repository: Path, name: str) -> None:
    """Raise ValueError naming the tasks there are if there is no such task."""
    names = TaskRegistry(repository).names()
    if name not in names:
        raise ValueError(f"name: there is no task {name[:64]!r}; the tasks here are {', '.join(names) or 'none'}")


def remove_task(repository: Path, name: str) -> None:
    """Delete a task's entries, its export (`sun export`) too. Raises ValueError naming the tasks there are if there is no such task."""
    check_known(repository, name)
    for folder in (f"prefill_{name}", name, kv_model(name)):
        shutil.rmtree(repository / folder, ignore_errors=True)
