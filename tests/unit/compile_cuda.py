"""Compiles all kernels that steps need, for an H100, without a GPU: run with numbers of rows.

Prints each scheme's name, and after it a line a kernel: its name, a program's warps, the bytes of shared memory that it takes, and "wgmma", "mma.sync" or "-".
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelInterface

from sun.decode.cuda.bnb import BnbNf4
from sun.decode.cuda.decoder import dummy
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.cuda.fp8 import Fp8
from sun.decode.cuda.table import FORMATS, dtype_of
from sun.decode.kv_pool import KVPool
from sun.model.shape import Angles, Shape

SHAPE = Shape(
    layers=1, hidden=1024, inner=8448, heads=8, kv_heads=2, head_dim=128, vocab=512, norm_eps=1e-5, max_context=64,
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
        print(kernel.__name__, made.metadata.num_warps, made.metadata.shared, next((word for word in ("wgmma", "mma.sync") if word in made.asm["ptx"]), "-"), flush=True)

    return launch


def main(rows: list[int]) -> None:
    """A step of so many rows in each scheme, on CPU tensors."""
    triton.runtime.driver.set_active(H100())
    KernelInterface.__getitem__ = compile_only
    for scheme, kind in FORMATS.items():
        if kind in (BnbNf4, Fp8):  # kernels of other packages, which need a GPU
            continue
        print(scheme, flush=True)
        dtype = dtype_of(scheme)
        pool = KVPool(SHAPE, 200, "cpu", dtype, spare=1)
        executor = CudaExecutor(dummy(SHAPE, scheme, dtype, torch.device("cpu")), pool, max(rows))
        slot = pool.take(1)
        for count in rows:
            executor.step([1] * count, [0] * count, [slot] * count)


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]])
