"""A decode step by number format and batch, against the time its bytes take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from types import SimpleNamespace

import torch

from sun.decode.cuda.decoder import Decoder, dummy
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.cuda.sampling import choose
from sun.decode.cuda.table import dtype_of
from sun.decode.kv_pool import KVPool
from sun_perf.gpu.books import Piece
from sun_perf.gpu.clock import Bandwidth, device_ms, median_ms
from sun_perf.gpu.plan import Plan


def decoder_of(plan: Plan, scheme: str, seed: int = 0) -> Decoder:
    """Random weights of the timed shape."""
    with torch.inference_mode():
        return dummy(plan.shape, scheme, dtype_of(scheme), plan.device, seed)


def pool_of(plan: Plan, scheme: str, sequences: int) -> KVPool:
    """Room for so many sequences of the plan's context and the next token, full of random numbers."""
    pool = KVPool(plan.shape, sequences * (plan.context + 1), plan.device, dtype_of(scheme), spare=1)
    pool.data.normal_()
    return pool


class Stepper:
    """Takes whole steps as the decode engine does: tokens in, the likeliest tokens out, one wait. Each sequence has the plan's context."""

    def __init__(self, plan: Plan, executor: CudaExecutor):
        self.executor, self.context = executor, plan.context
        greedy = SimpleNamespace(temperature=0.0, logprobs=None, penalised=False)
        self._row = SimpleNamespace(admit=SimpleNamespace(params=greedy), banned=list)
        self.slots = [executor.pool.take(plan.context + 1) for _ in range(executor.pool.budget // (plan.context + 1))]

    def forward(self, batch: int) -> torch.Tensor:
        """Logits of a step."""
        return self.executor.step([1] * batch, [self.context] * batch, self.slots[:batch])

    def step(self, batch: int) -> None:
        """One token of each sequence."""
        choose(self.forward(batch), [self._row] * batch)


def floor_ms(plan: Plan, decoder: Decoder, limits: Bandwidth, batch: int) -> float:
    """Least ms of a step by its bytes: the weights once, and each sequence's K and V."""
    kv = plan.shape.kv_bytes(plan.context + 1, decoder.dtype.itemsize) * batch
    return (decoder.step_bytes + kv) / 1e6 / limits.best


def steps(plan: Plan, scheme: str, limits: Callable[[], Bandwidth | None]) -> Iterator[Piece]:
    """A row a batch: ms of a step with sampling, of its kernels alone, without CUDA graphs; tokens/s; over the floor, where bandwidth was measured."""
    decoder, most = decoder_of(plan, scheme), max(plan.batches)
    pool = pool_of(plan, scheme, most)
    stepper = Stepper(plan, CudaExecutor(decoder, pool, most))
    eager = copy(stepper)  # with the same slots
    eager.executor = CudaExecutor(decoder, pool, most, graphs=False)

    def row(batch: int) -> Iterator[dict]:
        ms = median_ms(lambda: stepper.step(batch), plan.device, plan.times)
        kernels = device_ms(lambda: stepper.forward(batch), plan.device, plan.times)
        without = median_ms(lambda: eager.step(batch), plan.device, max(1, plan.times // 4))
        bandwidth = limits()
        least = None if bandwidth is None else floor_ms(plan, decoder, bandwidth, batch)
        yield {
            "scheme": scheme, "batch": batch, "context": plan.context, "ms": round(ms, 3), "kernels_ms": round(kernels, 3),
            "without_graphs_ms": round(without, 3), "tokens_s": round(batch / ms * 1e3, 1), "floor_ms": least and round(least, 3),
            "over_floor": least and round(ms / least, 2), "weights_gb": round(decoder.step_bytes / 1e9, 3)}

    for batch in plan.batches:
        yield f"batch {batch}", partial(row, batch)
