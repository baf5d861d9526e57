"""Compiles all kernels that a step needs, for an H100, without a GPU: run with a scheme. Prints each one's name once it is machine code."""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelInterface

from sun.decode.cuda.decoder import dummy
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.cuda.table import dtype_of
from sun.decode.kv_pool import KVPool
from sun.model.shape import Angles, Shape

SHAPE = Shape(
    layers=1, hidden=1024, inner=512, heads=8, kv_heads=2, head_dim=128, vocab=512, norm_eps=1e-5, max_context=64,
    rope=Angles([1.0] * 64), biases=True, normed=True)


class H100:
    """A driver for compiling only."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: JITFunction, grid):
    """In place of a launch: what it would launch, compiled."""
    def launch(*arguments, **options) -> None:
        made = kernel.run(*arguments, grid=grid, warmup=True, **options)
        assert made.asm["cubin"]
        print(kernel.__name__, "wgmma" if "wgmma" in made.asm["ptx"] else "", flush=True)

    return launch


def main(scheme: str, sizes: list[int]) -> None:
    """A step of each size on CPU tensors."""
    triton.runtime.driver.set_active(H100())
    KernelInterface.__getitem__ = compile_only
    dtype = dtype_of(scheme)
    pool = KVPool(SHAPE, 200, "cpu", dtype, spare=1)
    executor = CudaExecutor(dummy(SHAPE, scheme, dtype, torch.device("cpu")), pool, max(sizes))
    for size in sizes:
        executor.step([1] * size, [0] * size, [pool.take(1) for _ in range(size)])


if __name__ == "__main__":
    main(sys.argv[1], [int(size) for size in sys.argv[2:]])
