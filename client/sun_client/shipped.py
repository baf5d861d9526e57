"""The tasks that come with the repository, and whether the model repository has them as they are.

Compares files and manifests only, so that a look at a finished set-up imports no torch.
"""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path

from sun.model.manifest import TASK_FILE, BaseManifest, TaskManifest
from sun_client.root import Root

EMBEDDED = "smollm2"
"""The base that the shipped tasks were tuned on: `sun_build.base.EMBEDDED`, which to import would take seconds."""


@dataclass(frozen=True)
class Shipped:
    """A folder of `build/tasks/`: a LoRA adapter in peft's format with its `task.json`."""

    folder: Path
    manifest: TaskManifest

    @property
    def name(self) -> str:
        """The task's name."""
        return self.folder.name

    def fits(self, base: BaseManifest) -> bool:
        """Whether it was tuned on this base and with its prompts."""
        return (self.manifest.base_digest, self.manifest.prompt) == (base.digest, base.prompt)

    def current(self, root: Root) -> bool:
        """Whether the model repository has this task, with this manifest and these weights."""
        there = root.models / f"prefill_{self.name}" / "1"
        if not (there / TASK_FILE).is_file() or not (root.models / self.name / "config.pbtxt").is_file():
            return False
        if TaskManifest.load(there) != self.manifest:
            return False
        files = [path.name for path in self.folder.glob("adapter_*")]
        return all((there / name).is_file() and filecmp.cmp(self.folder / name, there / name, shallow=False) for name in files)


def shipped(root: Root) -> list[Shipped]:
    """The shipped tasks, sorted by name."""
    return [Shipped(path.parent, TaskManifest.load(path.parent)) for path in sorted(root.shipped.glob(f"*/{TASK_FILE}"))]


def base_to_do(root: Root) -> str | None:
    """Why the base must be laid out anew, as a phrase; None if the shipped tasks were tuned on it, or the user chose another."""
    try:
        base = root.manifest()
    except FileNotFoundError:
        return "there is none yet"
    except ValueError:
        return "the one there is not readable"
    if base.source != EMBEDDED:
        return None
    for task in shipped(root):
        if task.manifest.base_digest != base.digest:
            return f"it is {base.digest[:19]}, but task {task.name} was tuned on {task.manifest.base_digest[:19]}"
    return None
