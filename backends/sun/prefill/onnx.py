"""Executor ``onnx``: a task's module, exported by `sun export`, in ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sun.model.manifest import BaseManifest, TaskManifest
from sun.model.quantise import FULL
from sun.model.weights import map_checkpoint
from sun.prefill.exported import INPUT, ONNX_FILE, OUTPUT, STATES, ExportManifest
from sun.prefill.jobs import Chunk


def session(path: Path, threads: int, shared: dict[str, Tensor] = {}):
    """An ONNX Runtime session on the CPU, and what must live as long as it does.

    shared: float32 tensors to use in place of the file's initialisers of their names, as they lie in memory: memory-mapped ones stay
    shared between processes. Names that the graph does not have are passed over. Without any, weights are packed for their kernels
    instead, which is quicker and takes a copy of them. Raises RuntimeError saying what to install where onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeError(f"executor onnx needs ONNX Runtime ({error}): pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Waiting threads would take the cores from decoding; plans of memory are made per shape, and every prompt has another one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in shared.items() if tensor.dtype is torch.float32}
    if values:
        options.add_session_config_entry("session.disable_prepacking", "1")
    for name, value in values.items():
        options.add_initializer(name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), values


class OnnxExecutor:
    """Prompts one after the other: a batch would have to be padded, and from some twenty tokens on gains nothing on a CPU.

    folder: with the ONNX file and its `export.json`. checkpoint: the folder of the weights that it was made of, see `checkpoint_of`. If
    no adapter is merged into them, they are used from there, shared with all processes that do; otherwise they are this process's own.
    """

    continues = states = False
    max_tokens = 0
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, folder: str | Path, checkpoint: str | Path, base: BaseManifest, task: TaskManifest, threads: int = 1):
        exported = ExportManifest.load(folder)
        exported.check(base, task, "onnx")
        self.states, self._hidden = exported.states, base.hidden
        shares = exported.lora != "merged" and exported.dtype == FULL
        self._session, self._shared = session(Path(folder) / ONNX_FILE, threads, map_checkpoint(checkpoint) if shares else {})

    def run(self, chunks: list[Chunk]) -> None:
        """See `Executor.run`. The KV is written where it is published from."""
        for chunk in chunks:
            kv = chunk.job.kv
            binding = self._session.io_binding()
            binding.bind_cpu_input(INPUT, chunk.ids.unsqueeze(0).numpy())
            binding.bind_output(OUTPUT, "cpu", 0, np.float32, (1, *kv.shape), kv.data_ptr())
            states = torch.empty(1, chunk.size, self._hidden if self.states else 0)
            if self.states:
                binding.bind_output(STATES, "cpu", 0, np.float32, tuple(states.shape), states.data_ptr())
            self._session.run_with_iobinding(binding)
            if chunk.ends:
                chunk.job.hidden = states[0, -1].clone()
