"""What a decode step does between its linear layers and attention, in Triton language: one program a row, or a row's head.

A linear layer's output comes in ``parts`` [parts, batch, out], whose sum it is, without its bias (`sun.decode.cuda.formats`):
whoever reads it adds them up, so that a layer that is split over its inputs costs no launch more. All sums are in float32.

What is made for a linear layer is rounded as the layer takes it (`sun.decode.cuda.formats.Format`); float16 is kept within its range.

Under TRITON_INTERPRET=1 these run on CPU tensors, too; there bf16 has no arithmetic, so it is converted where it is read and written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum(parts, bias, row, batch, width, at, mask, PARTS: tl.constexpr, BIAS: tl.constexpr):
    """A linear layer's output of ``row`` at columns ``at``."""
    value = tl.load(parts + row * width + at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(parts + (part * batch + row) * width + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def rounded(value, out):
    """As ``out`` has it; what is no number stays none."""
    if out.dtype.element_ty == tl.float16:
        value = tl.maximum(value, -65504.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return value.to(out.dtype.element_ty)


@triton.jit(do_not_specialize=["batch"])
def add_norm(x, parts, bias, weight, out, eps, batch, width, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """x [batch, width] float32 += a layer's output (nothing where PARTS is 0); out = RMSNorm(x) * weight (arXiv 1910.07467). Grid: batch."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0)
    if PARTS > 0:
        value += _sum(parts, bias, row, batch, width, at, inside, PARTS, BIAS)
        tl.store(x + row * width + at, value, mask=inside)
    root = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    scaled = value * root * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, rounded(scaled, out), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def rotate_and_keep(parts, bias, norms, cos, sin, starts, positions, q, kv, eps, batch, span,
                    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
                    PARTS: tl.constexpr, BIAS: tl.constexpr, NORMED: tl.constexpr):
    """One head of one row: its RMSNorm where there is one (Qwen3), rotary embedding (arXiv 2104.09864), then to where it is read.

    parts [PARTS, batch, (HEADS + 2 KV_HEADS) SIZE]: queries, keys, values. norms [2, SIZE]: of queries and of keys.
    cos, sin [batch, SIZE]. Queries go to q [batch, HEADS, SIZE]; keys and values to kv [2, KV_HEADS, span, SIZE] at token
    ``starts + positions``. HALF: a power of two of at least SIZE / 2. Grid: (batch, HEADS + 2 KV_HEADS).
    """
    row, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, HALF)
    inside = i < SIZE // 2
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * SIZE
    a = _sum(parts, bias, row, batch, width, head * SIZE + i, inside, PARTS, BIAS)
    b = _sum(parts, bias, row, batch, width, head * SIZE + SIZE // 2 + i, inside, PARTS, BIAS)
    if head < HEADS + KV_HEADS:
        if NORMED:
            weight = norms + (head >= HEADS).to(tl.int32) * SIZE
            root = 1.0 / tl.sqrt((tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / SIZE + eps)
            a = a * root * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
            b = b * root * tl.load(weight + SIZE // 2 + i, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + row * SIZE + i, mask=inside, other=0.0)
        s = tl.load(sin + row * SIZE + i, mask=inside, other=0.0)
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    if head < HEADS:
        to = q + (row * HEADS + head) * SIZE
        tl.store(to + i, a.to(q.dtype.element_ty), mask=inside)
        tl.store(to + SIZE // 2 + i, b.to(q.dtype.element_ty), mask=inside)
    else:
        # Keys' heads, then values', as they lie in the pool.
        token = tl.load(starts + row) + tl.load(positions + row)
        to = kv + ((head - HEADS) * span + token) * SIZE
        tl.store(to + i, a.to(kv.dtype.element_ty), mask=inside)
        tl.store(to + SIZE // 2 + i, b.to(kv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def silu_product(parts, bias, columns, out, batch, width, PARTS: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """out [batch, width] = silu(gate) * up of parts [PARTS, batch, 2 width], gate before up; COLUMNS: times columns [width]. Grid: (batch, width / BLOCK)."""
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = _sum(parts, bias, row, batch, 2 * width, at, inside, PARTS, BIAS)
    up = _sum(parts, bias, row, batch, 2 * width, width + at, inside, PARTS, BIAS)
    value = gate / (1.0 + tl.exp(-gate)) * up
    if COLUMNS:
        value *= tl.load(columns + at, mask=inside, other=0.0)
    tl.store(out + row * width + at, rounded(value, out), mask=inside)
