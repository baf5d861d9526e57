"""What a decode step cannot be faster than on this machine: bytes at its bandwidth, products at its best rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass

import torch
from torch import Tensor

from sun.decode.packed import Int8, OneDnn, Packed, pack
from sun.model.codes import COARSE, Codes
from sun.model.llama import Llama

WEIGHT_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 5, "nf4": 32, "bnb-int8": 8, "bnb-nf4": 4.5}
"""As they lie in memory: int4 has a scale and a minimum of 16 bits per 32 weights; nf4 runs dequantised; bnb-nf4 has a scale of
32 bits per 64 (16 where it has its own kernel for bf16). The head has 8 bits in all but fp32 and bf16, which this leaves out."""
BF16_INPUTS = ("int4", "bnb-nf4")
SIZE = 2048


@dataclass(frozen=True)
class Machine:
    """read_gb_s: bandwidth of reading memory. fp32, int8, bf16: best rates of a matrix product with packed weights, ours or a library's, in GFLOP/s. By ``threads`` threads.

    bf16 is 0 where the CPU has no products of its own for it: float32's are its limit there.
    """

    threads: int
    read_gb_s: float
    fp32_gflop_s: float
    int8_gflop_s: float
    bf16_gflop_s: float = 0.0

    @classmethod
    def measure(cls, threads: int, megabytes: int = 512, size: int = SIZE) -> Machine:
        """By a sum over a buffer beyond any cache, and by layers of ``size`` x ``size`` on 64 rows. Sets torch's threads."""
        torch.set_num_threads(threads)
        buffer = torch.ones(megabytes * 2**18)
        weight, x = torch.randn(size, size), torch.randn(64, size)
        unit = x / x.abs().amax(1, keepdim=True)
        products = 2 * x.shape[0] * size * size / 1e9
        codes = Codes(COARSE, split=False, smooth=torch.ones(size))
        integers, alone = codes.weight(weight), threads == 1

        def rate(rows: Tensor, *layers: Packed) -> float:
            return round(products / min(fastest(lambda layer=layer: layer(rows)) for layer in layers), 1)

        return cls(
            threads, round(buffer.nbytes / 1e9 / fastest(buffer.sum), 2),
            rate(x, OneDnn(weight), pack(weight, "fp32", None, alone)), rate(unit, Int8(integers, codes), pack(integers, "int8", codes, alone)),
            rate(x.bfloat16(), OneDnn(weight.bfloat16())) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 0.0)

    def best(self, other: Machine) -> Machine:
        """The higher of two readings of each: what else a shared machine does comes and goes."""
        return Machine(self.threads, *(max(pair) for pair in list(zip(astuple(self), astuple(other), strict=True))[1:]))

    def as_dict(self) -> dict[str, float]:
        """As it is written to JSON."""
        return asdict(self)


@torch.inference_mode()
def fastest(run: Callable[[], object], times: int = 9) -> float:
    """Seconds of the fastest of some runs: a limit is what the machine can do undisturbed."""
    def once() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return min(once() for _ in range(times))


def floor_ms(model: Llama, limits: Machine, scheme: str, batch: int, context: int) -> float:
    """Least ms of a step: linear layers by their bytes or their products, whichever takes longer; then K and V, read once.

    Of the float32 model: its linear weights and its head, ``batch`` sequences of ``context`` tokens.
    """
    weights = model.head.weight.numel() + sum(
        linear.weight.numel() for layer in model.layers for linear in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down))
    rate = limits.int8_gflop_s if scheme.endswith("int8") else limits.fp32_gflop_s
    if scheme in BF16_INPUTS:
        rate = max(rate, limits.bf16_gflop_s)
    linear_s = max(weights * WEIGHT_BITS[scheme] / 8 / 1e9 / limits.read_gb_s, 2 * weights * batch / 1e9 / rate)
    kv_s = model.geometry.kv_bytes(context, 4) * batch / 1e9 / limits.read_gb_s
    return (linear_s + kv_s) * 1e3
