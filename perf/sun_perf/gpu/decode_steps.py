"""A decode step by number format and batch, against the time its bytes take; and what low-bit layers gain, cut in other ways."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sun.decode.cuda.decoder import Decoder, dummy
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.cuda.formats import dtype_of, pack
from sun.decode.cuda.linear_kernel import MOST_SPLITS, STEP, Tile
from sun.decode.cuda.sampling import choose
from sun.decode.kv_pool import KVPool
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


def steps(plan: Plan, scheme: str, limits: Bandwidth) -> list[dict]:
    """A row a batch: ms of a step with sampling, of its kernels alone, without CUDA graphs; tokens/s; over the floor."""
    decoder, most = decoder_of(plan, scheme), max(plan.batches)
    pool = pool_of(plan, scheme, most)
    stepper, rows = Stepper(plan, CudaExecutor(decoder, pool, most)), []
    eager = CudaExecutor(decoder, pool, most, graphs=False)
    for batch in plan.batches:
        ms = median_ms(lambda batch=batch: stepper.step(batch), plan.device, plan.times)
        kernels = device_ms(lambda batch=batch: stepper.forward(batch), plan.device, plan.times)
        least = floor_ms(plan, decoder, limits, batch)
        with_graphs, stepper.executor = stepper.executor, eager
        without = median_ms(lambda batch=batch: stepper.step(batch), plan.device, max(1, plan.times // 4))
        stepper.executor = with_graphs
        rows.append({
            "scheme": scheme, "batch": batch, "context": plan.context, "ms": round(ms, 3), "kernels_ms": round(kernels, 3),
            "without_graphs_ms": round(without, 3), "tokens_s": round(batch / ms * 1e3, 1), "floor_ms": round(least, 3), "over_floor": round(ms / least, 2),
            "weights_gb": round(decoder.step_bytes / 1e9, 3)})
    return rows


def tiles(plan: Plan, scheme: str) -> list[dict]:
    """The layers of the timed shape cut in several ways: us of the default one and of the fastest, at two sizes of batch."""
    found, limit = [], plan.batches[-1]
    for name, (outputs, inputs) in plan.shape.linears.items():
        weight = torch.randn(outputs, inputs, device=plan.device, dtype=torch.bfloat16)
        # Two of them by turns do not stay in a cache of 50 MB.
        layers = [pack(weight, scheme, torch.bfloat16) for _ in range(2)]
        dense = pack(weight, "bf16", torch.bfloat16)
        default = layers[0].tile
        candidates = [default, *(
            Tile(width, splits, warps, stages) for width, warps in ((64, 4), (128, 8), (128, 4)) for splits in (1, 2, 4, MOST_SPLITS)
            for stages in (4, 6) if splits <= inputs // STEP)]
        for rows in sorted({min(16, limit), limit}):
            x = torch.randn(rows, inputs, device=plan.device, dtype=torch.bfloat16)
            times = {}
            for tile in candidates[: None if plan.device.type == "cuda" else 2]:
                if plan.left_s < 0:
                    break

                def run(tile: Tile = tile) -> None:
                    for layer in layers:
                        layer.tile = tile
                        layer(x)

                times[tile] = device_ms(run, plan.device, plan.times) / len(layers) * 1e3
            best = min(times, key=times.__getitem__, default=default)
            found.append({
                "scheme": scheme, "layer": name, "outputs": outputs, "inputs": inputs, "rows": rows, "default": str(default),
                "default_us": round(times.get(default, 0.0), 1), "best": str(best), "best_us": round(times.get(best, 0.0), 1),
                "bf16_us": round(device_ms(lambda x=x, dense=dense: dense(x), plan.device, plan.times) * 1e3, 1)})
    return found
