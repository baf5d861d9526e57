"""A linear layer whose weights are 8- or 4-bit integers, for few rows, in Triton language: a weight is read once, in its own size.

Codes lie as [inputs / step, outputs, PIECE] 16-bit words, a code of each of a step's pieces in a word: what one program reads
at a time is one piece of memory, whatever its size. The weights are the product's left side (y^T = W x^T): tensor cores take
that side from registers, where it was made of its codes, and rows, of which there are few, become the narrow side.

It is instructions that are scarce, not bandwidth. So two neighbours are made at once, in float16: their codes are masked out
of one register into the mantissa of a number whose exponent is known (16 + code, 1024 + code), which needs no conversion, and
one addition or multiplication takes the excess away ("Who says elephants can't run", arXiv 2211.10017). By the compiler's
output for an H100 that takes 2.7 instructions a 4-bit weight and 2.3 an 8-bit one, of which a third is everything else.
bf16 has too few bits for that; inputs come in float16, too, divided by 16, so that they have room (`BY`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sun.decode.cuda.dots import interpreted
from sun.model.quantise import GROUP

PIECE = GROUP
"""Inputs that are multiplied at once: one group of 4-bit codes."""
PIECES = {8: 2, 4: 4}
"""Codes in a word, by their bits."""
CHUNK = 64
"""Outputs whose 4-bit scales lie together."""
MOST_SPLITS = 8
PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""
BY = 1 / 16
"""What inputs are multiplied by before they are rounded to float16, and weights by its inverse: inputs may be 1,048,064 then (where they are smoothed
first, by their column's share of that), and what is below 0.00012 keeps fewer bits than in bf16."""


@dataclass(frozen=True)
class Tile:
    """How a layer is cut: outputs a program, over how many programs its inputs are split, warps, stages of the pipeline that reads ahead, steps at once."""

    outputs: int
    splits: int
    warps: int
    stages: int
    unroll: int


def rows_for(batch: int) -> int:
    """How many rows of ``batch`` a program takes."""
    return min(64, max(16, triton.next_power_of_2(batch)))


def tile_for(outputs: int, inputs: int, bits: int, rows: int) -> Tile:
    """One form for all layers of few outputs and one for those of many, near the fastest of those measured on an H200 with Llama-3.1-8B's.

    rows: 16, 32 or 64, of which a program takes all. Inputs are split until there were so many programs a multiprocessor if each
    took ``width`` outputs, with 512 inputs each or more. `sun_perf.gpu`, part tiles, tries others.
    """
    few = rows == 16
    width, most = (256, 1.5) if bits == 4 else (128, 3 if few else 1.5)
    tiles, splits = -(-outputs // width), 1
    while splits < MOST_SPLITS and tiles * splits < most * PROCESSORS and inputs >= 2 * splits * 512:
        splits *= 2
    if bits == 4:
        return Tile(64, splits, warps=2, stages=3, unroll=1) if few else Tile(4 * rows, splits, warps=rows // 8, stages=3, unroll=1)
    if few:
        return Tile(64, splits, warps=2, stages=4, unroll=1) if outputs <= 16384 else Tile(128, splits, warps=4, stages=3, unroll=1)
    return Tile(128, splits, warps=8, stages=3, unroll=1 if inputs % (4 * PIECE) else 2)


# $1: a word of each of two neighbours; $2 and $4: scale and rest of their output, twice in a register. To bits 6 to 9, 16 + code, times scale, plus rest.
_FOUR = "{{ .reg .b32 t; {} lop3.b32 t, t, 0x03C003C0, 0x4C004C00, 0xEA; fma.rn.f16x2 $0, t, $2, $4; }}"
FOUR_0, FOUR_1, FOUR_2, FOUR_3 = (
    tl.constexpr(_FOUR.format(shift)) for shift in ("shl.b32 t, $1, 6;", "shl.b32 t, $1, 2;", "shr.u32 t, $1, 2;", "shr.u32 t, $1, 6;"))
# 1024 + code, less 1024 + 128.
_EIGHT = "{{ .reg .b32 t, less; {} lop3.b32 t, t, 0x00FF00FF, 0x64006400, 0xEA; mov.b32 less, 0xE480E480; add.f16x2 $0, t, less; }}"
EIGHT_0, EIGHT_1 = (tl.constexpr(_EIGHT.format(shift)) for shift in ("mov.b32 t, $1;", "shr.u32 t, $1, 8;"))
TWICE_LOW, TWICE_HIGH = (tl.constexpr(f"prmt.b32 $0, $1, $1, {places};") for places in ("0x1010", "0x3232"))


@triton.jit
def four_bits(words, pair, I: tl.constexpr, ASM: tl.constexpr):
    """Weights [N, PIECE] float16 of piece I of 4-bit words [N, PIECE]: scale (16 + code) + rest, both float16, of pair [N] uint32, scale in its low half."""
    if ASM:
        scale = tl.inline_asm_elementwise(TWICE_LOW, "=r,r", [pair], dtype=tl.uint32, is_pure=True, pack=1)
        rest = tl.inline_asm_elementwise(TWICE_HIGH, "=r,r", [pair], dtype=tl.uint32, is_pure=True, pack=1)
        made = tl.inline_asm_elementwise(
            FOUR_0 if I == 0 else FOUR_1 if I == 1 else FOUR_2 if I == 2 else FOUR_3, "=r,r,r,r,r,r", [words, scale[:, None], rest[:, None]],
            dtype=tl.float16, is_pure=True, pack=2)
    else:
        scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        rest = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        made = ((((words >> (4 * I)) & 15).to(tl.float32) + 16.0) * scale[:, None] + rest[:, None]).to(tl.float16)
    return made


@triton.jit
def eight_bits(words, I: tl.constexpr, ASM: tl.constexpr):
    """Codes [N, PIECE] float16 of piece I of 8-bit words [N, PIECE], where they have 128 more."""
    if ASM:
        made = tl.inline_asm_elementwise(EIGHT_0 if I == 0 else EIGHT_1, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        made = (((words >> (8 * I)) & 255).to(tl.float32) - 128.0).to(tl.float16)
    return made


@triton.jit(do_not_specialize=["batch"])
def multiply(x, codes, scales, parts, batch, inputs, outputs, share,
             BITS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr,
             N: tl.constexpr, M: tl.constexpr, ASM: tl.constexpr):
    """parts [splits, batch, outputs] float32: each the product of x [batch, inputs] float16 with ``share`` times UNROLL steps of the weight's inputs.

    A step is PIECES pieces of PIECE inputs. codes uint16 [steps, outputs, PIECE]: word j has the code of input PIECE i + j at bits BITS i.
    4 bits: scales uint32 [steps, outputs / CHUNK, PIECES, CHUNK], see `four_bits`; 8 bits: scales float32 [outputs].
    ASM: by the GPU's own instructions. Grid: (outputs / N, splits, batch / M).
    """
    n, split, m = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1), tl.program_id(2) * M + tl.arange(0, M)
    j = tl.arange(0, PIECE)
    there, rows = n < outputs, m < batch
    acc = tl.zeros([N, M], tl.float32)
    first, wide, padded = split * share, PIECES * PIECE * UNROLL, tl.cdiv(outputs, CHUNK) * CHUNK
    x_at = x + m[None, :] * inputs + j[:, None]
    codes_at = codes + n[:, None] * PIECE + j[None, :]
    scales_at = scales + n // CHUNK * (PIECES * CHUNK) + n % CHUNK
    for step in range(first, tl.minimum(first + share, inputs // wide)):
        # Moved once a step, so that what follows is at fixed distances, which loads have in them.
        x_now, codes_now, scales_now = x_at + step * wide, codes_at + step * (UNROLL * outputs * PIECE), scales_at + step * (UNROLL * PIECES * padded)
        for u in tl.static_range(UNROLL):
            words = tl.load(codes_now + u * outputs * PIECE, mask=there[:, None], other=0)
            for i in tl.static_range(PIECES):
                given = tl.load(x_now + (u * PIECES + i) * PIECE, mask=rows[None, :], other=0.0)
                if BITS == 4:
                    pair = tl.load(scales_now + (u * PIECES * padded + i * CHUNK), mask=there, other=0)
                    weight = four_bits(words, pair, i, ASM)
                else:
                    weight = eight_bits(words, i, ASM)
                acc = tl.dot(weight, given, acc)
    if BITS == 8:
        acc = acc * tl.load(scales + n, mask=there, other=0.0)[:, None]
    tl.store(parts + (split * batch + m)[None, :] * outputs + n[:, None], acc, mask=there[:, None] & rows[None, :])


def run(x: Tensor, codes: Tensor, scales: Tensor, bits: int, tiles: dict[int, Tile]) -> Tensor:
    """Parts [splits, batch, outputs] float32 of x [batch, inputs] float16. tiles: by rows. See `multiply`."""
    (batch, inputs), outputs = x.shape, codes.shape[1]
    rows = rows_for(batch)
    tile = tiles[rows]
    parts = torch.empty(tile.splits, batch, outputs, dtype=torch.float32, device=x.device)
    multiply[triton.cdiv(outputs, tile.outputs), tile.splits, triton.cdiv(batch, rows)](
        x, codes, scales, parts, batch, inputs, outputs, triton.cdiv(inputs // (PIECES[bits] * PIECE * tile.unroll), tile.splits),
        BITS=bits, PIECES=PIECES[bits], PIECE=PIECE, UNROLL=tile.unroll, CHUNK=CHUNK, N=tile.outputs, M=rows, ASM=not interpreted(),
        num_warps=tile.warps, num_stages=tile.stages)
    return parts
