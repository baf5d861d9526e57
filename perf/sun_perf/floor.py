"""What a decode step cannot be faster than on this machine: bytes at its bandwidth, products at its best rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from sun.decode.packed import Int8, OneDnn
from sun.model.llama import Llama
from sun.model.quantise import COARSE, Codes

WEIGHT_BITS = {"fp32": 32, "int8": 8, "int4": 5, "nf4": 32}
"""As they lie in memory: int4 has a scale and a minimum of 16 bits per 32 weights; nf4 runs dequantised."""
SIZE = 2048


@dataclass(frozen=True)
class Machine:
    """read_gb_s: bandwidth of reading memory. fp32, int8: best rates of a matrix product with packed weights, in GFLOP/s. By ``threads`` threads."""

    threads: int
    read_gb_s: float
    fp32_gflop_s: float
    int8_gflop_s: float

    @classmethod
    def measure(cls, threads: int, megabytes: int = 512, size: int = SIZE) -> Machine:
        """By a sum over a buffer beyond any cache, and by layers of ``size`` x ``size`` on 64 rows. Sets torch's threads."""
        torch.set_num_threads(threads)
        buffer = torch.ones(megabytes * 2**18)
        weight, x = torch.randn(size, size), torch.randn(64, size)
        unit = x / x.abs().amax(1, keepdim=True)
        products = 2 * x.shape[0] * size * size / 1e9
        codes = Codes(COARSE, split=False, smooth=torch.ones(size))
        return cls(
            threads, round(buffer.nbytes / 1e9 / fastest(buffer.sum), 2),
            *(round(products / fastest(lambda layer=layer, rows=rows: layer(rows)), 1)
              for layer, rows in ((OneDnn(weight), x), (Int8(codes.weight(weight), codes), unit))))

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
    rate = limits.int8_gflop_s if scheme == "int8" else limits.fp32_gflop_s
    linear_s = max(weights * WEIGHT_BITS[scheme] / 8 / 1e9 / limits.read_gb_s, 2 * weights * batch / 1e9 / rate)
    kv_s = model.geometry.kv_bytes(context, 4) * batch / 1e9 / limits.read_gb_s
    return (linear_s + kv_s) * 1e3
