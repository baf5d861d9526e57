"""A linear layer whose weights are 8- or 4-bit integers, for few rows, in Triton language: a weight is read once, in its own size.

Codes lie as [inputs / step, outputs, ...]: what one program reads at a time is one piece of memory, whatever its size. The
weights are the product's left side (y^T = W x^T): Hopper's tensor cores take that side from registers, where it was made of
its codes, and rows, of which there are few, become the narrow side.

With 4 bits it is instructions that are scarce, not bandwidth, so a word of 32 bits holds one code of each of eight groups:
a code is masked out of it where it lies, and its group's scale makes up for the place. By the compiler's output for an H100
that takes 6 instructions a weight, and none of the slow conversions that bytes need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sun.decode.cuda.dots import dot_type
from sun.model.quantise import GROUP

STEP = 64
"""Inputs that a program reads at once of 8-bit codes."""
STEP4 = 8 * GROUP
"""And of 4-bit ones: one group for each code in a word."""
MOST_SPLITS = 8


@dataclass(frozen=True)
class Tile:
    """How a layer is cut: outputs a program, over how many programs its inputs are split, warps, stages of the pipeline that reads ahead."""

    outputs: int
    splits: int
    warps: int
    stages: int


def tile_for(outputs: int, inputs: int, step: int, processors: int = 132) -> Tile:
    """One and a half programs a multiprocessor (of an H100) with four large steps each or more, by the layer alone: it does not depend on the batch.

    By arithmetic, not by measurement: bandwidth times latency is some 16 KB a multiprocessor, and parts cost 4 bytes an
    output, row and split, so there are no more of them than that takes.
    """
    width = 64 if outputs <= 16384 else 128
    tiles, splits = -(-outputs // width), 1
    while splits < MOST_SPLITS and 2 * tiles * splits < 3 * processors and inputs >= 2 * splits * 4 * STEP4:
        splits *= 2
    return Tile(width, splits, warps=width // 16, stages=3 if step == STEP4 else 6)


@triton.jit(do_not_specialize=["batch"])
def multiply(x, codes, scales, columns, parts, batch, inputs, outputs, share,
             FOUR: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, M: tl.constexpr, DOT: tl.constexpr):
    """parts [splits, batch, outputs] float32: each the product of x [batch, inputs] with ``share`` steps of the weight's inputs.

    FOUR: codes uint32 [inputs / STEP, outputs, 32], the code of input 32 i + j of a step at bits 4 i of word j; scales uint32
    [inputs / 32, outputs], in its low half a float16 scale, in the high one a float16 zero: a weight is (code - 8) scale + zero.
    (A word of 32 bits is the least that is read ahead.) Otherwise codes int8 [inputs / STEP, outputs, STEP], scales float32 [outputs].
    COLUMNS: x is first multiplied by columns [inputs]. Grid: (outputs / N, splits, batch / M).
    """
    n, split, m = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1), tl.program_id(2) * M + tl.arange(0, M)
    PIECES: tl.constexpr = 8 if FOUR else 1
    WIDTH: tl.constexpr = STEP // PIECES
    j = tl.arange(0, WIDTH)
    there, rows = n < outputs, m < batch
    acc = tl.zeros([N, M], tl.float32)
    first = split * share
    for step in range(first, tl.minimum(first + share, inputs // STEP)):
        packed = tl.load(codes + (step * outputs + n)[:, None] * WIDTH + j[None, :], mask=there[:, None], other=0)
        for piece in tl.static_range(PIECES):
            at = step * STEP + piece * WIDTH + j
            given = tl.load(x + m[None, :] * inputs + at[:, None], mask=rows[None, :], other=0.0)
            if COLUMNS:
                given = (given.to(tl.float32) * tl.load(columns + at)[:, None]).to(x.dtype.element_ty)
            if FOUR:
                pair = tl.load(scales + (PIECES * step + piece) * outputs + n, mask=there, other=0)
                scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                least = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) - 8.0 * scale
                # The code where it lies is 16^piece times as large: powers of two, so nothing is lost.
                code = (packed & (15 << (4 * piece))).to(tl.float32)
                weight = (code * (scale * (1.0 / 16**piece))[:, None] + least[:, None]).to(x.dtype.element_ty).to(DOT)
            else:
                weight = packed.to(DOT)
            acc = tl.dot(weight, given.to(DOT), acc, input_precision="ieee")
    if not FOUR:
        acc = acc * tl.load(scales + n, mask=there, other=0.0)[:, None]
    tl.store(parts + (split * batch + m)[None, :] * outputs + n[:, None], acc, mask=there[:, None] & rows[None, :])


def run(x: Tensor, codes: Tensor, scales: Tensor, columns: Tensor | None, outputs: int, tile: Tile) -> Tensor:
    """Parts [splits, batch, outputs] float32 of x [batch, inputs]. See `multiply`."""
    (batch, inputs), four = x.shape, codes.dtype is torch.uint32
    step = STEP4 if four else STEP
    rows = min(64, max(16, triton.next_power_of_2(batch)))
    parts = torch.empty(tile.splits, batch, outputs, dtype=torch.float32, device=x.device)
    multiply[triton.cdiv(outputs, tile.outputs), tile.splits, triton.cdiv(batch, rows)](
        x, codes, scales, columns, parts, batch, inputs, outputs, triton.cdiv(inputs // step, tile.splits),
        FOUR=four, COLUMNS=columns is not None, STEP=step, N=tile.outputs, M=rows, DOT=dot_type(x.dtype),
        num_warps=tile.warps, num_stages=tile.stages)
    return parts
