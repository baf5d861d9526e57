"""A linear layer whose weights are 8- or 4-bit integers, for few rows, in Triton language: a weight is read once, in its own size.

Codes lie as [inputs / STEP, outputs, bytes]: what one program reads at a time is one piece of memory, whatever its size. The
weights are the product's left side (y^T = W x^T): Hopper's tensor cores take that side from registers, where it was made of
its codes, and rows, of which there are few, become the narrow side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sun.decode.cuda.dots import dot_type

STEP = 64
"""Inputs that a program reads at once: two groups of 4-bit codes, which share bytes."""
MOST_SPLITS = 8


@dataclass(frozen=True)
class Tile:
    """How a layer is cut: outputs a program, over how many programs its inputs are split, warps, stages of the pipeline that reads ahead."""

    outputs: int
    splits: int
    warps: int = 4
    stages: int = 6


def tile_for(outputs: int, inputs: int, processors: int = 132) -> Tile:
    """One and a half programs a multiprocessor (of an H100) with eight steps each, by the layer alone: it does not depend on the batch.

    By arithmetic, not by measurement: a program has about five steps of 2.5 to 8 KB on their way, and bandwidth times latency
    is some 16 KB a multiprocessor. Parts cost 4 bytes an output, row and split, so there are no more than that takes.
    """
    width = 64 if outputs <= 16384 else 128
    tiles, splits = -(-outputs // width), 1
    while splits < MOST_SPLITS and 2 * tiles * splits < 3 * processors and inputs // STEP >= 16 * splits:
        splits *= 2
    return Tile(width, splits, warps=width // 16)


@triton.jit(do_not_specialize=["batch"])
def multiply(x, codes, scales, columns, parts, batch, inputs, outputs, share,
             FOUR: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, M: tl.constexpr, DOT: tl.constexpr):
    """parts [splits, batch, outputs] float32: each the product of x [batch, inputs] with ``share`` steps of the weight's inputs.

    FOUR: codes uint8 [inputs / STEP, outputs, STEP / 2], the low halves of its bytes before the high ones, and scales uint32
    [inputs / 32, outputs], the low half of it a float16 scale, the high one a float16 zero: a weight is (code - 8) scale + zero.
    (A word of 32 bits is the least that is read ahead.) Otherwise codes int8 [inputs / STEP, outputs, STEP], scales float32 [outputs].
    COLUMNS: x is first multiplied by columns [inputs]. Grid: (outputs / N, splits, batch / M).
    """
    n, split, m = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1), tl.program_id(2) * M + tl.arange(0, M)
    HALF: tl.constexpr = STEP // 2
    WIDTH: tl.constexpr = HALF if FOUR else STEP
    j = tl.arange(0, WIDTH)
    there, rows = n < outputs, m < batch
    acc = tl.zeros([N, M], tl.float32)
    first = split * share
    for step in range(first, tl.minimum(first + share, inputs // STEP)):
        packed = tl.load(codes + (step * outputs + n)[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0)
        for half in tl.static_range(2 if FOUR else 1):
            at = step * STEP + half * HALF + j
            given = tl.load(x + m[None, :] * inputs + at[:, None], mask=rows[None, :], other=0.0)
            if COLUMNS:
                given = (given.to(tl.float32) * tl.load(columns + at)[:, None]).to(x.dtype.element_ty)
            if FOUR:
                pair = tl.load(scales + (2 * step + half) * outputs + n, mask=there, other=0)
                scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                least = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) - 8.0 * scale
                weight = ((packed >> (4 * half)) & 15).to(tl.float32) * scale[:, None] + least[:, None]
                weight = weight.to(x.dtype.element_ty).to(DOT)
            else:
                weight = packed.to(DOT)
            acc = tl.dot(weight, given.to(DOT), acc, input_precision="ieee")
    if not FOUR:
        acc = acc * tl.load(scales + n, mask=there, other=0.0)[:, None]
    tl.store(parts + (split * batch + m)[None, :] * outputs + n[:, None], acc, mask=there[:, None] & rows[None, :])


def run(x: Tensor, codes: Tensor, scales: Tensor, columns: Tensor | None, outputs: int, tile: Tile) -> Tensor:
    """Parts [splits, batch, outputs] float32 of x [batch, inputs]. See `multiply`."""
    batch, inputs = x.shape
    rows = min(64, max(16, triton.next_power_of_2(batch)))
    parts = torch.empty(tile.splits, batch, outputs, dtype=torch.float32, device=x.device)
    multiply[triton.cdiv(outputs, tile.outputs), tile.splits, triton.cdiv(batch, rows)](
        x, codes, scales, columns, parts, batch, inputs, outputs, triton.cdiv(inputs // STEP, tile.splits),
        FOUR=codes.dtype is torch.uint8, COLUMNS=columns is not None, STEP=STEP, N=tile.outputs, M=rows, DOT=dot_type(x.dtype),
        num_warps=tile.warps, num_stages=tile.stages)
    return parts
