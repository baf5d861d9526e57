"""Executor ``onnx``: a task's module, exported by `sun export`, in ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sun.model.manifest import BaseManifest, TaskManifest
from sun.prefill.exported import INPUT, ONNX_FILE, OUTPUT, ExportManifest
from sun.prefill.jobs import Chunk


def session(path: Path, threads: int):
    """An ONNX Runtime session on the CPU. Raises RuntimeError saying what to install where onnxruntime is missing."""
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
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxExecutor:
    """Prompts one after the other: a batch would have to be padded, and from some twenty tokens on gains nothing on a CPU.

    folder: with the ONNX file and its `export.json`. Unlike torch's, its weights are its process's own: nothing of them is shared.
    """

    continues = False
    max_tokens = 0

    def __init__(self, folder: str | Path, base: BaseManifest, task: TaskManifest, threads: int = 1):
        ExportManifest.load(folder).check(base, task)
        self._session = session(Path(folder) / ONNX_FILE, threads)

    def run(self, chunks: list[Chunk]) -> None:
        """See `Executor.run`. The KV is written where it is published from."""
        for chunk in chunks:
            kv = chunk.job.kv
            binding = self._session.io_binding()
            binding.bind_cpu_input(INPUT, chunk.ids.unsqueeze(0).numpy())
            binding.bind_output(OUTPUT, "cpu", 0, np.float32, (1, *kv.shape), kv.data_ptr())
            self._session.run_with_iobinding(binding)
