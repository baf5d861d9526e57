"""From folders to models: a task's prefill module and the shared decode module."""

from __future__ import annotations

from pathlib import Path

from sun.model.llama import Llama
from sun.model.manifest import BaseManifest, TaskManifest
from sun.model.weights import checkpoint_files, load_lora, map_checkpoint, weights_digest


def task_weight_files(task_dir: str | Path, kind: str) -> list[Path]:
    """The files whose bytes a task's weights digest covers; none for the identity task."""
    if kind == "identity":
        return []
    if kind == "lora":
        return [Path(task_dir) / "adapter_config.json", Path(task_dir) / "adapter_model.safetensors"]
    return checkpoint_files(task_dir)


def task_digest(task_dir: str | Path, kind: str) -> str:
    """Digest of a task's weights as the manifest and every ticket carry it."""
    return "identity" if kind == "identity" else weights_digest(task_weight_files(task_dir, kind))


def load_decode(base_dir: str | Path) -> tuple[BaseManifest, Llama]:
    """The shared decode module: the base's weights, memory-mapped."""
    base = BaseManifest.load(base_dir)
    return base, Llama(base, map_checkpoint(base_dir))


def load_prefill(base_dir: str | Path, task_dir: str | Path) -> tuple[TaskManifest, Llama]:
    """A task's prefill module. Raises ValueError naming the manifest's field if base, digest or kind do not fit."""
    base, task = BaseManifest.load(base_dir), TaskManifest.load(task_dir)
    if task.base_digest != base.digest:
        raise ValueError(f"task.json base_digest: {task.name} was made for base {task.base_digest}, this base is {base.digest}")
    if task.prompt != base.prompt:
        raise ValueError(f"task.json prompt: {task.name} was tuned with {task.prompt}, this repository prompts with {base.prompt}")
    got = task_digest(task_dir, task.weights)
    if got != task.weights_digest:
        raise ValueError(f"task.json weights_digest: says {task.weights_digest}, the weights of {task.name} are {got}")
    if task.weights == "lora":
        return task, Llama(base, map_checkpoint(base_dir), load_lora(task_dir))
    return task, Llama(base, map_checkpoint(task_dir if task.weights == "full" else base_dir))
