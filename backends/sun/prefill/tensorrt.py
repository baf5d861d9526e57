"""Executor ``tensorrt``: a plan that `sun export` built, run here on the GPU. Written for TensorRT 10 and 11."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from sun.prefill.exported import INPUT, outputs


def missing() -> str | None:
    """What this machine lacks for plans, in a sentence; None if nothing."""
    try:
        import tensorrt  # noqa: F401
    except ImportError as error:
        return f"the package tensorrt does not import ({error}); install the version that your Triton container has"
    try:
        started = ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        started = False
    return None if started else "there is no NVIDIA GPU, or its driver does not start"


class Plan:
    """A plan as a function of token ids [batch, length] to its outputs, all on the CPU (`sun.prefill.padded.Compute`), by the profile that covers all shapes.

    device: where torch keeps what goes in and comes out; "cpu" is for a stand-in of TensorRT. states: see `outputs`. Raises RuntimeError if it cannot read the plan.
    """

    def __init__(self, plan: Path, device: str = "cuda", states: bool = False):
        import tensorrt

        self._device, self._outputs = torch.device(device), outputs(states)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        with self._here():
            self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
            if self._engine is None:
                raise RuntimeError(f"TensorRT {tensorrt.__version__} cannot read {plan}: a plan is for the version and the kind of GPU that built it")
            self._context = self._engine.create_execution_context()
            self._context.set_optimization_profile_async(self._engine.num_optimization_profiles - 1, self._handle)

    def __call__(self, ids: Tensor) -> list[Tensor]:
        with self._here():
            ids = ids.to(self._device)
            self._context.set_input_shape(INPUT, tuple(ids.shape))
            made = {name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=torch.float32, device=self._device) for name in self._outputs}
            for name, tensor in {INPUT: ids, **made}.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            if not self._context.execute_async_v3(self._handle):
                raise RuntimeError("TensorRT did not run the plan; its log above says why")
            return [tensor.cpu() for tensor in made.values()]

    @property
    def _handle(self) -> int:
        return 0 if self._stream is None else self._stream.cuda_stream

    def _here(self):
        """The device and its stream as this thread's current ones."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
