"""`sun export --format onnx`: a task's prefill module as an ONNX file, checked against torch in ONNX Runtime."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from sun.model.llama import Llama
from sun.model.loading import load_prefill
from sun.prefill.exported import INPUT, ONNX_FILE, ExportManifest, Parity, outputs
from sun.prefill.onnx import session
from sun_build.export import parity
from sun_build.export.module import PrefillModule

OPSET = 18
"""The default: every runtime of the last years reads it. From 23 on attention and RMSNorm are single nodes."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing() -> str:
    """What this machine lacks for an export, in a sentence; empty if nothing."""
    lacks = [name for name in PACKAGES if not version_of(name)]
    return f"install {', '.join(lacks)}" if lacks else ""


def version_of(package: str) -> str:
    """An installed package's version, or the empty string."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def export_onnx(base_dir: Path, task_dir: Path, folder: Path, dtype: str = "fp32", merged: bool = True, opset: int = OPSET,
                max_batch: int = 8) -> ExportManifest:
    """Write a task's `model.onnx` (weights beside it in `model.onnx.data`) and `export.json` into ``folder``.

    dtype, merged: see `PrefillModule`. max_batch: what Triton is told; the graph takes any. The file must pass onnx's checker, and its
    outputs in ONNX Runtime must be torch's within `parity.LIMITS`; bf16, which ONNX Runtime does not compute on CPUs, is checked as the
    torch module that was traced. Raises ValueError as `load_prefill` does, RuntimeError for missing packages or a KV that is off.
    """
    if lack := missing():
        raise RuntimeError(f"format onnx: {lack}")
    task, module = PrefillModule.load(base_dir, task_dir, dtype, merged)
    path = folder / ONNX_FILE
    trace(module, path, opset)
    check_file(path)
    found = measured(path, module, load_prefill(base_dir, task_dir)[1], dtype, max_batch)
    parity.check(found, dtype)
    manifest = ExportManifest(
        format="onnx", task=task.name, base_digest=task.base_digest, weights_digest=task.weights_digest, dtype=dtype,
        lora="none" if task.weights != "lora" else "merged" if merged else "separate", opset=opset, max_batch=max_batch, states=task.whole_prompt, parity=found,
        versions={"torch": str(torch.__version__)} | {name: version_of(name) for name in PACKAGES})
    manifest.save(folder)
    return manifest


@torch.no_grad()
def trace(module: PrefillModule, path: Path, opset: int) -> None:
    """Write the graph of a module, with batch and length dynamic."""
    example = torch.ones(2, 16, dtype=torch.int64)
    shapes = {INPUT: {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it names every operator of packages that are not there
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(), (example,), dynamo=True, opset_version=opset, input_names=[INPUT], output_names=list(outputs(module.states)), dynamic_shapes=shapes)
    finally:
        logger.setLevel(level)
    assert program is not None  # it is only for the other exporter
    program.save(str(path), external_data=True)


def check_file(path: Path) -> None:
    """Raise onnx's error if its checker or shape inference finds fault with a file."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)


def measured(path: Path, module: PrefillModule, model: Llama, dtype: str, max_batch: int) -> Parity:
    """The export's parity, from ONNX Runtime where that computes its dtype, else from the traced module."""
    if dtype == "bf16":
        with torch.inference_mode():
            return parity.compare(module, model, "torch", max_batch, states=module.states)
    loaded, _ = session(path, threads=1)

    def compute(ids: Tensor) -> list[Tensor]:
        return [torch.from_numpy(made) for made in loaded.run(list(outputs(module.states)), {INPUT: ids.numpy()})]

    return parity.compare(compute, model, f"onnxruntime {version_of('onnxruntime')}", max_batch, states=module.states)
