"""Attention of one token per sequence over its own slot, in Triton language: ragged lengths, in place.

A program takes all query heads that share a K and V head, so K and V are read once. A sequence's context is split over up
to `SPLITS` programs by its own length alone (flash-decoding, 2023; the running softmax is that of arXiv 2205.14135), and a
second kernel joins them: nothing of a row's result depends on its neighbours or on the size of the batch. Starts and
lengths are read from tensors, so a captured CUDA graph serves any of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sun.decode.cuda.dots import dot_type
from sun.decode.cuda.layer_kernels import rounded

SPLITS = 16
"""Most programs that share a sequence's K and V head: 8 heads times 16 are about the multiprocessors of an H100."""
BLOCK = 64
"""Tokens that a program reads at once."""
LOG2E = 1.4426950408889634


@triton.jit
def _share(length, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of a sequence that one program takes: whole blocks."""
    return (length + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK


@triton.jit
def attend_parts(q, kv, starts, positions, mixed, tops, totals, scale, span,
                 KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                 BLOCK: tl.constexpr, SPLITS: tl.constexpr, DOT: tl.constexpr):
    """Softmax attention over a part of the context, not yet divided by its sum.

    q [batch, KV_HEADS GROUP, SIZE]; kv [2, KV_HEADS, span, SIZE]; starts, positions [batch]: attention is over tokens
    ``starts`` to ``starts + positions``. mixed [batch, heads, SPLITS, SIZE] float32 of shares relative to 2^tops, tops and
    totals (their sums) [batch, heads, SPLITS]; parts beyond the context are left as they are. scale: with log2(e).
    ROWS, WIDTH: powers of two of at least 16, GROUP, SIZE. Grid: (batch, KV_HEADS, SPLITS).
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(starts + row), tl.load(positions + row).to(tl.int32) + 1
    share = _share(length, SPLITS, BLOCK)
    first = split * share
    if first < length:
        last = tl.minimum(first + share, length)
        g, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        heads = row * (KV_HEADS * GROUP) + head * GROUP + g
        query = tl.load(q + heads[:, None] * SIZE + d[None, :], mask=(g < GROUP)[:, None] & (d < SIZE)[None, :], other=0.0).to(DOT)
        keys, values = kv + (head * span + start) * SIZE, kv + ((KV_HEADS + head) * span + start) * SIZE
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for at in range(first, last, BLOCK):
            n = at + tl.arange(0, BLOCK)
            k = tl.load(keys + n[None, :] * SIZE + d[:, None], mask=(n < last)[None, :] & (d < SIZE)[:, None], other=0.0).to(DOT)
            v = tl.load(values + n[:, None] * SIZE + d[None, :], mask=(n < last)[:, None] & (d < SIZE)[None, :], other=0.0)
            scores = tl.dot(query, k, input_precision="ieee") * scale
            scores = tl.where((n < last)[None, :], scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
            total = total * shrink + tl.sum(weights, axis=1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype).to(DOT), v.to(DOT), input_precision="ieee")
            top = higher
        to = heads * SPLITS + split
        tl.store(tops + to, top, mask=g < GROUP)
        tl.store(totals + to, total, mask=g < GROUP)
        tl.store(mixed + to[:, None] * SIZE + d[None, :], acc, mask=(g < GROUP)[:, None] & (d < SIZE)[None, :])


@triton.jit
def join_parts(mixed, tops, totals, positions, columns, out,
               SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [batch, heads, SIZE]: the parts of `attend_parts`, brought to one top, added and divided; COLUMNS: times columns [heads, SIZE].

    Grid: (batch, heads).
    """
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(positions + row).to(tl.int32) + 1
    s, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    used = s * _share(length, SPLITS, BLOCK) < length
    at = (row * tl.num_programs(1) + head) * SPLITS + s
    top = tl.load(tops + at, mask=used, other=-float("inf"))
    weight = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(weight * tl.load(totals + at, mask=used, other=0.0), axis=0)
    parts = tl.load(mixed + at[:, None] * SIZE + d[None, :], mask=used[:, None] & (d < SIZE)[None, :], other=0.0)
    value = tl.sum(parts * weight[:, None], axis=0) / total
    if COLUMNS:
        value *= tl.load(columns + head * SIZE + d, mask=d < SIZE, other=0.0)
    tl.store(out + (row * tl.num_programs(1) + head) * SIZE + d, rounded(value, out), mask=d < SIZE)


class Attention:
    """Runs both kernels for batches of up to ``most`` rows with contexts of up to ``tokens``, with room for their parts."""

    def __init__(self, heads: int, kv_heads: int, size: int, most: int, tokens: int, device: torch.device):
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.splits = min(SPLITS, triton.next_power_of_2(triton.cdiv(tokens, BLOCK)))
        self._mixed = torch.empty(most, heads, self.splits, size, dtype=torch.float32, device=device)
        self._tops, self._totals = torch.empty(2, most, heads, self.splits, dtype=torch.float32, device=device)

    def __call__(self, q: Tensor, kv: Tensor, starts: Tensor, positions: Tensor, columns: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """[batch, heads * head_dim] of q [batch, heads, head_dim] over kv [2, kv_heads, tokens, head_dim], a layer's pool.

        starts, positions [batch] int64: a row attends to the tokens from its start to its position, both included.
        columns [heads * head_dim] float32: by what the result is multiplied (None: nothing) before it is rounded to ``dtype``, None for q's.
        """
        batch, group = len(q), self.heads // self.kv_heads
        width = max(16, triton.next_power_of_2(self.size))
        attend_parts[batch, self.kv_heads, self.splits](
            q, kv, starts, positions, self._mixed, self._tops, self._totals, self.size**-0.5 * LOG2E, kv.shape[2],
            KV_HEADS=self.kv_heads, GROUP=group, SIZE=self.size, ROWS=max(16, triton.next_power_of_2(group)), WIDTH=width,
            BLOCK=BLOCK, SPLITS=self.splits, DOT=dot_type(kv.dtype), num_warps=4, num_stages=2)
        out = torch.empty(batch, self.heads * self.size, dtype=dtype or q.dtype, device=q.device)
        join_parts[batch, self.heads](
            self._mixed, self._tops, self._totals, positions, columns, out,
            SIZE=self.size, WIDTH=width, BLOCK=BLOCK, SPLITS=self.splits, COLUMNS=columns is not None, num_warps=2)
        return out
