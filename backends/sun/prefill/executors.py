"""Which prefill executors there are, and a task's module where they run it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from sun import gpu
from sun.model.loading import load_prefill
from sun.model.llama import Llama
from sun.model.manifest import GPU_PREFILL_SCHEMES, TaskManifest
from sun.prefill import tensorrt
from sun.prefill.device import DTYPES, DeviceModule

EXECUTORS = ("torch", "onnx", "triton", "cuda", "tensorrt")


def why_not(executor: str) -> str | None:
    """What keeps an executor from running here; None if nothing does. `triton` runs in a server that serves the exported module."""
    if executor == "cuda":
        return gpu.missing()
    if executor == "tensorrt":
        return gpu.missing() or tensorrt.missing()
    if executor == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        return "the onnxruntime package is not installed"
    return None


def load(base_dir: str | Path, task_dir: str | Path, executor: str, scheme: str, device: str | None = None) -> tuple[TaskManifest, Llama | DeviceModule]:
    """A task's manifest, as tickets are to carry it, and its module: on ``device`` ("cuda:0"; "cpu" does for tests) for executor `cuda`.

    Raises ValueError for an executor or scheme that there is not, RuntimeError for one that does not run on this machine.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor: got {executor!r}, expected one of {', '.join(EXECUTORS)}")
    if executor == "tensorrt" and (reason := why_not(executor)):
        raise RuntimeError(f"executor: tensorrt does not run here: {reason}")
    if executor != "cuda":
        return load_prefill(base_dir, task_dir, scheme)
    if scheme not in GPU_PREFILL_SCHEMES:
        raise ValueError(f"scheme: got {scheme!r}, executor cuda has {', '.join(GPU_PREFILL_SCHEMES)}")
    on = torch.device(device or "cuda")
    reason = why_not("cuda") if on.type == "cuda" else None
    if reason is None and scheme == "bf16":
        reason = gpu.capability_missing(on, (8, 0))
    if reason:
        raise RuntimeError(f"executor: cuda does not run here: {reason}")
    task, model = load_prefill(base_dir, task_dir)
    return task.run_as(scheme), DeviceModule.of_model(model, DTYPES[scheme], on, task.whole_prompt)
