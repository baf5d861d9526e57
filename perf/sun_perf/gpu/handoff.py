"""What a prompt's KV costs on its way from the host into the device's pool."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from sun.decode.kv_pool import KVPool
from sun_perf.gpu.books import Piece
from sun_perf.gpu.clock import median_ms
from sun_perf.gpu.plan import Plan


def handoff(plan: Plan) -> Iterator[Piece]:
    """A row a prompt length and format: ms and us a token of `KVPool.fill` from ordinary and from page-locked memory (bf16 in the pool)."""
    for tokens in plan.prompts:
        yield f"{tokens} tokens", partial(rows, plan, tokens)


def rows(plan: Plan, tokens: int) -> Iterator[dict]:
    """One length's."""
    pool = KVPool(plan.shape, tokens, plan.device, torch.bfloat16, spare=1)
    slot, wide = pool.take(tokens), torch.rand(plan.shape.layers, 2, plan.shape.kv_heads, tokens, plan.shape.head_dim)
    for kv in (wide, wide.bfloat16()):
        made = {"tokens": tokens, "dtype": str(kv.dtype).removeprefix("torch."), "mb": round(kv.nbytes / 1e6, 2)}
        for name, source in (("pageable", kv), ("pinned", kv.pin_memory() if plan.device.type == "cuda" else kv)):
            ms = median_ms(lambda source=source: pool.fill(slot, source), plan.device, max(1, plan.times // 2))
            made |= {f"{name}_ms": round(ms, 3), f"{name}_us_per_token": round(ms * 1e3 / tokens, 2), f"{name}_gb_s": round(kv.nbytes / 1e6 / ms, 2)}
        yield made
