"""A task is a folder: what `sun task add` writes into the model repository."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from sun.model.loading import load_prefill, task_digest, task_files
from sun.model.manifest import TASK_FILE, BaseManifest, TaskManifest, write_manifest
from sun.model.weights import ADAPTER_FILES, INDEX_FILE
from sun_build.config_file import entry, parameter, without
from sun_build.ensemble import ensemble_config
from sun_build.task_entries import check_name

EXPORTED = {"onnx": "", "triton": "", "tensorrt": "cuda"}
"""Executors that run a task's export in place of its weights -> which runs the weights where they did; "" is the default."""
PREFILL_CONFIG = """\
# {name}: prompt token ids x1..x(n-1) -> KV ticket, with this task's weights. Written by `sun task add`.
backend: "sun_prefill"
instance_group [{{ kind: KIND_CPU, count: 1 }}]
"""


def weights_kind(weights: Path | None) -> str:
    """"identity" without a folder, "lora" for one with peft's files, else "full". ValueError if it is none of them."""
    if weights is None:
        return "identity"
    if (weights / ADAPTER_FILES[0]).is_file():
        return "lora"
    if (weights / "model.safetensors").is_file() or (weights / INDEX_FILE).is_file():
        return "full"
    raise ValueError(f"weights: {weights} holds neither a LoRA adapter ({', '.join(ADAPTER_FILES)}) nor a safetensors checkpoint")


def new_manifest(base: BaseManifest, folder: Path, kind: str, name: str, sampling: dict | None = None,
                 metric: dict | None = None, whole_prompt: bool = False) -> TaskManifest:
    """The manifest of a task whose weights in ``folder`` are taken to belong to ``base``."""
    return TaskManifest(
        name=name, weights=kind, weights_digest=task_digest(folder, kind), base_digest=base.digest, prompt=base.prompt,
        sampling=sampling or {}, metric=metric or {}, whole_prompt=whole_prompt)


def manifest_of(base: BaseManifest, folder: Path, kind: str, name: str) -> TaskManifest:
    """The manifest of weights as task ``name``: the `task.json` beside them, which says what base they are for, else a new one."""
    if kind != "identity" and (folder / TASK_FILE).is_file():
        return msgspec.structs.replace(TaskManifest.load(folder), name=name)
    return new_manifest(base, folder, kind, name)


def describe_weights(base_dir: Path, folder: Path, name: str, sampling: dict | None = None, metric: dict | None = None,
                     whole_prompt: bool = False) -> TaskManifest:
    """Write the `task.json` of tuned weights beside them, so that they say which base and prompt they were made for."""
    manifest = new_manifest(BaseManifest.load(base_dir), folder, weights_kind(folder), name, sampling, metric, whole_prompt)
    write_manifest(folder, manifest)
    return manifest


def add_task(repository: Path, base_dir: Path, name: str, weights: Path | None = None) -> TaskManifest:
    """Write `prefill_<name>` and the ensemble `<name>` into a model repository; replaces a task of that name, whose settings stay.

    weights: a folder with a LoRA adapter in peft's format or a full checkpoint; None for the base's own weights. A
    `task.json` in it (tuning writes one) must fit the base, and its sampling defaults and metric are taken over.
    Raises ValueError naming what of name or weights does not fit.
    """
    with placed_task(repository, base_dir, name, weights) as manifest:
        return manifest


@contextmanager
def placed_task(repository: Path, base_dir: Path, name: str, weights: Path | None = None) -> Iterator[TaskManifest]:
    """Inside, the task is there as `add_task` adds it; if the block raises, what was there before is back."""
    check_name(repository, name)
    base, kind = BaseManifest.load(base_dir), weights_kind(weights)
    source = weights or base_dir
    manifest = manifest_of(base, source, kind, name)
    # Made beside and moved in, so that a task is in the repository whole or not at all.
    with tempfile.TemporaryDirectory(dir=repository.parent, prefix=".task-") as scratch:
        prefill, ensemble = Path(scratch) / f"prefill_{name}", Path(scratch) / name
        (prefill / "1").mkdir(parents=True)
        (ensemble / "1").mkdir(parents=True)
        (prefill / "config.pbtxt").write_text(prefill_config(repository, name))
        (ensemble / "config.pbtxt").write_text(ensemble_config(name, manifest.whole_prompt))
        for file in task_files(source, kind):
            shutil.copyfile(file, prefill / "1" / file.name)
        write_manifest(prefill / "1", manifest)
        load_prefill(base_dir, prefill / "1")  # what the server will do: weights that do not fit are refused here
        with _moved_in(repository, prefill, ensemble):
            yield manifest


@contextmanager
def _moved_in(repository: Path, *folders: Path) -> Iterator[None]:
    """Inside, the folders are in the repository, and those that they replace beside where they were; if the block raises, all are where they were."""
    places = [(folder, repository / folder.name, folder.with_name(f"old_{folder.name}")) for folder in folders]
    try:
        for folder, target, old in places:
            if target.exists():
                target.rename(old)
            folder.rename(target)
        yield
    except BaseException:
        for folder, target, old in places:
            if not folder.exists():
                target.rename(folder)
            if old.exists():
                old.rename(target)
        raise


def prefill_config(repository: Path, name: str) -> str:
    """The prefill module's `config.pbtxt`: what somebody has set in an earlier one stays, but for an executor of an export, which is of the old weights."""
    earlier = repository / f"prefill_{name}" / "config.pbtxt"
    if not earlier.is_file():
        return PREFILL_CONFIG.format(name=name)
    text, executor = earlier.read_text(), parameter(repository, earlier.parent.name, "executor")
    if executor not in EXPORTED:
        return text
    instead = EXPORTED[executor]
    return without(text, "executor") + (entry("executor", instead) if instead else "")
