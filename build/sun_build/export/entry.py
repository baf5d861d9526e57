"""`sun export`: where an export goes. An entry of a model repository, or a task's own folder, which then serves it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from sun.model.loading import load_prefill
from sun.model.manifest import BaseManifest, TaskManifest
from sun.prefill.exported import EXPORT_FILE, ONNX_FILE, PLAN_FILE, ExportManifest, kv_model
from sun.prefill.tensorrt import Plan
from sun_build.export import parity, tensorrt
from sun_build.export.module import PrefillModule
from sun_build.export.onnx import OPSET, export_onnx
from sun_build.export.profiles import profiles
from sun_build.export.triton import config_text
from sun_build.task_entries import check_known

TIMING_CACHE = Path(".run") / "tensorrt.timing"
"""Below the root: times of kernels, by GPU and TensorRT version."""


@dataclass(frozen=True)
class Export:
    """One task of ``repository`` and how it is exported; see `export_onnx`. max_tokens: the longest prompt that a plan takes. gpu: of
    ONNX Runtime in Triton."""

    repository: Path
    base_dir: Path
    task: str
    dtype: str = "fp32"
    merged: bool = True
    opset: int = OPSET
    max_batch: int = 8
    max_tokens: int = 2048
    gpu: bool = True

    def __post_init__(self) -> None:
        check_known(self.repository, self.task)

    @property
    def task_dir(self) -> Path:
        """The task's manifest and weights."""
        return self.repository / f"prefill_{self.task}" / "1"

    def onnx_in_task(self) -> ExportManifest:
        """Put an ONNX file beside the task's weights, where executor ``onnx`` looks for it."""
        with scratch(self.repository.parent) as folder:
            manifest = self._onnx(folder)
            move(folder, self.task_dir)
        return manifest

    def onnx(self, out: Path) -> ExportManifest:
        """Write `kv_<task>` for Triton's ONNX Runtime backend below ``out``, in place of one that is there."""
        with scratch(out.absolute().parent) as folder:
            manifest = self._onnx(folder)
            self._place(folder, manifest, out)
        return manifest

    def plan(self, out: Path | None) -> ExportManifest:
        """Write `kv_<task>` for Triton's TensorRT backend below ``out``; with an adapter that is not merged, one that `refit` can change.

        Without ``out``, put the plan beside the task's weights, where executor ``tensorrt`` looks for it.

        Raises RuntimeError saying what is missing where no plan can be built.
        """
        trt = tensorrt.tensorrt_module()
        made = profiles(self.max_batch, min(self.max_tokens, BaseManifest.load(self.base_dir).max_context - 2))
        with scratch(self.repository.parent) as onnx, scratch((out or self.repository).absolute().parent) as folder:
            manifest = self._onnx(onnx)
            tensorrt.build_plan(trt, onnx / ONNX_FILE, folder / PLAN_FILE, made, self.adapter(), self.repository.parent / TIMING_CACHE)
            manifest = msgspec.structs.replace(
                manifest, format="tensorrt", max_tokens=made[-1].most[1], parity=self._parity(trt, folder / PLAN_FILE, manifest, made[-1].most[1]),
                versions=manifest.versions | {"tensorrt": trt.__version__})
            manifest.save(folder)
            self._place(folder, manifest, out, len(made))
        return manifest

    def refit(self, out: Path) -> ExportManifest:
        """Give the plan of `kv_<task>` below ``out`` the task's adapter as it is now, without building.

        Raises ValueError naming the field by which it is not a plan that can take it, RuntimeError naming weights that do not fit.
        """
        trt, old = tensorrt.tensorrt_module(), out / kv_model(self.task) / "1"
        manifest, base = ExportManifest.load(old), BaseManifest.load(self.base_dir)
        states = TaskManifest.load(self.task_dir).whole_prompt
        for field, value in {"format": "tensorrt", "lora": "separate", "base_digest": base.digest, "states": states}.items():
            if getattr(manifest, field) != value:
                raise ValueError(f"{EXPORT_FILE} {field}: is {getattr(manifest, field)!r}, a refit needs {value!r}: build the plan anew")
        export = Export(self.repository, self.base_dir, self.task, manifest.dtype, False, manifest.opset, manifest.max_batch)
        task, _ = load_prefill(self.base_dir, self.task_dir)
        with scratch(out.absolute().parent) as folder:
            tensorrt.refit_plan(trt, old / PLAN_FILE, folder / PLAN_FILE, export.adapter())
            manifest = msgspec.structs.replace(manifest, weights_digest=task.weights_digest, parity=export._parity(trt, folder / PLAN_FILE, manifest, manifest.max_tokens))
            manifest.save(folder)
            self._place(folder, manifest, out, len(profiles(manifest.max_batch, manifest.max_tokens)))
        return manifest

    def _onnx(self, folder: Path) -> ExportManifest:
        return export_onnx(self.base_dir, self.task_dir, folder, self.dtype, self.merged, self.opset, self.max_batch)

    def adapter(self) -> dict[str, torch.Tensor]:
        """The initialisers that `refit` changes: none if the adapter is merged."""
        return PrefillModule.load(self.base_dir, self.task_dir, self.dtype, self.merged)[1].adapter

    def _parity(self, trt, plan: Path, manifest: ExportManifest, max_tokens: int) -> parity.Parity | None:
        """The plan's own parity, where torch has the GPU to run it."""
        if not torch.cuda.is_available():
            return None
        model = load_prefill(self.base_dir, self.task_dir)[1]
        found = parity.compare(Plan(plan, states=manifest.states), model, f"tensorrt {trt.__version__}", self.max_batch, max_tokens, manifest.states)
        parity.check(found, self.dtype)
        return found

    def _place(self, folder: Path, manifest: ExportManifest, out: Path | None, count: int = 0) -> None:
        """Make the files of ``folder`` version 1 of the entry below ``out``, or the task's own."""
        if out is None:
            return move(folder, self.task_dir)
        made = folder / kv_model(self.task)
        (made / "1").mkdir(parents=True)
        move(folder, made / "1")
        out.mkdir(exist_ok=True)
        (made / "config.pbtxt").write_text(config_text(manifest, BaseManifest.load(self.base_dir), count, self.gpu))
        shutil.rmtree(out / made.name, ignore_errors=True)
        made.replace(out / made.name)


def move(folder: Path, target: Path) -> None:
    """The files of a folder."""
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.replace(target / file.name)


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """A folder to export into, beside the repository that it will go to: it gets there whole or not at all, and a server sees no part of it."""
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".export-") as folder:
        yield Path(folder)
