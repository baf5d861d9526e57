"""The systems that are compared, and repositories that serve them: conventional disaggregation and SUN, from the same tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file

from sun.model.loading import merged, task_files
from sun.model.manifest import BaseManifest, write_manifest
from sun.model.weights import load_lora, map_checkpoint
from sun_build.config_file import entry
from sun_build.tasks import new_manifest

KV_TOKENS = 32768
"""KV slots of all decode workers together: the same for every system."""
CONFIG = 'backend: "{backend}"\ninstance_group [{{ kind: KIND_CPU, count: 1 }}]\n'


@dataclass(frozen=True)
class System:
    """A way to serve N tasks. workers: decode workers for N tasks. own: each of them with a task's own full weights.

    scheme: of the decode weights; None for the run's own low-bit scheme. router: parameters of a shared pool's router.
    """

    name: str
    title: str
    workers: Callable[[int], int]
    own: bool = False
    scheme: str | None = "fp32"
    router: Mapping[str, str | int] = field(default_factory=lambda: {"policy": "pack"})


SYSTEMS = {system.name: system for system in (
    System("partitioned", "Conventional: a decode worker per task", lambda tasks: tasks, own=True),
    System("sun", "SUN: half as many workers, shared", lambda tasks: max(1, tasks // 2)),
    System("sun_all", "SUN: as many workers as tasks, shared", lambda tasks: tasks),
    System("qsun", "QSUN: half as many workers, low-bit", lambda tasks: max(1, tasks // 2), scheme=None),
)}


@dataclass(frozen=True)
class Material:
    """What repositories are made of. adapters: LoRA adapters of the base, used in turn where tasks are more."""

    base: Path
    backends: Path
    adapters: Sequence[Path]
    threads: int = 1
    scheme: str = "int8"


def task_names(count: int) -> list[str]:
    """Names of ``count`` tasks, the most popular first."""
    return [f"task_{i}" for i in range(count)]


def merge(base_dir: Path, adapter: Path, folder: Path) -> None:
    """Write base and adapter merged as the full checkpoint of one task, pages of its own: W + B A for every layer that has them."""
    folder.mkdir(parents=True)
    save_file(merged(map_checkpoint(base_dir), load_lora(adapter)), folder / "model.safetensors")


def lay_out(root: Path, full: Path, material: Material, system: System, tasks: int) -> Path:
    """Write a root that serves ``tasks`` tasks as ``system`` does; ``full`` holds each task's full weights, made when first needed.

    A conventional task's prefill module and decode worker map the same file. Elsewhere they would be on different machines and
    hold it twice; sharing it here is in the baseline's favour.
    """
    names, workers = task_names(tasks), [f"decode_{i}" for i in range(system.workers(tasks))]
    for link, target in ((root / "backends", material.backends), (root / "build" / "base", material.base)):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target.absolute())
    for i, name in enumerate(names):
        adapter = material.adapters[i % len(material.adapters)]
        if system.own and not (full / name).is_dir():
            merge(material.base, adapter, full / name)
        _prefill(root, material, name, full / name if system.own else adapter, "full" if system.own else "lora")
    for i, worker in enumerate(workers):
        parameters = {"kv_tokens": KV_TOKENS // len(workers), "threads": material.threads, "scheme": system.scheme or material.scheme}
        if system.own:
            parameters["weights"] = str((full / names[i]).absolute())
        _model(root, worker, "sun_decode", parameters)
    owners = " ".join(f"{task}={worker}" for task, worker in zip(names, workers, strict=False))
    _model(root, "sun", "sun_router", {"policy": "partitioned", "owners": owners} if system.own else system.router)
    return root


def _prefill(root: Path, material: Material, name: str, weights: Path, kind: str) -> None:
    folder = _model(root, f"prefill_{name}", "sun_prefill", {"threads": material.threads})
    for file in task_files(weights, kind):
        (folder / file.name).symlink_to(file.absolute())
    write_manifest(folder, new_manifest(BaseManifest.load(material.base), folder, kind, name))


def _model(root: Path, name: str, backend: str, parameters: Mapping[str, str | int]) -> Path:
    folder = root / "model_repository" / name / "1"
    folder.mkdir(parents=True)
    text = CONFIG.format(backend=backend) + "".join(entry(key, str(value)) for key, value in parameters.items())
    (folder.parent / "config.pbtxt").write_text(text)
    return folder
