"""What a decode step does between its linear layers, compiled by numba on first use and cached beside this file.

Each kernel works on rows ``first`` to ``last`` (sequences of the batch) and lets go of Python's lock, so that threads can
share a batch. A row's result depends on that row alone.

Between kernels lie linear layers that may want their input as integer codes (`sun.decode.packed`). A kernel therefore
writes it as such a layer takes it, by ``form``: `PLAIN`; `UNIT`, divided by the row's largest magnitude, which goes to
``scale`` [batch]; or `SPLIT`, that in two rows, coarse codes and what they leave, the second one ``batch`` rows below. And it
reads a layer's output the same way round: a row times its scale, plus its second row if there is one, plus the bias.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from sun.decode.vectors import AVX512, LANES, ROWS, tile_of_floats
from sun.model.codes import COARSE

PLAIN, UNIT, SPLIT = 0, 1, 2
F32, I32 = np.float32, np.int32
TINY = F32(1e-30)
# Sums may be taken in any order (that is what makes them fast), but infinities and NaN stay what they are.
compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
inlined = njit(inline="always", error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@intrinsic
def _float_of_bits(typing, bits):
    """int32 -> the float32 of the same bits."""
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@inlined
def exponential(x):
    """e^x in float32 for x <= 88, to 2 in the last place; vectorises, unlike the C library's (Cephes' expf)."""
    x = max(x, F32(-87.0))
    n = np.floor(x * F32(1.44269504088896341) + F32(0.5))
    r = x - n * F32(0.693359375) + n * F32(2.12194440e-4)
    p = F32(1.9875691500e-4)
    p = p * r + F32(1.3981999507e-3)
    p = p * r + F32(8.3334519073e-3)
    p = p * r + F32(4.1665795894e-2)
    p = p * r + F32(1.6666665459e-1)
    p = p * r + F32(5.0000001201e-1)
    return (p * r * r + r + F32(1.0)) * _float_of_bits((I32(n) + I32(127)) << I32(23))


@compiled
def _read(y, row, batch, scale, bias, start, out):
    """out [n] = a linear layer's output y [batch or 2 batch, ...] at ``row``, columns from ``start``."""
    one = scale[row]
    if y.shape[0] == batch:
        for j in range(out.shape[0]):
            out[j] = y[row, start + j] * one + bias[start + j]
    else:
        two = one * F32(1.0 / (2 * COARSE))
        for j in range(out.shape[0]):
            out[j] = y[row, start + j] * one + y[batch + row, start + j] * two + bias[start + j]


@compiled
def _write(value, row, batch, form, out, scale):
    """Write value [n] (changed on the way) to ``out`` as ``form`` has it."""
    if form == PLAIN:
        for j in range(value.shape[0]):
            out[row, j] = value[j]
        return
    top = TINY
    for j in range(value.shape[0]):
        top = max(top, abs(value[j]))
    scale[row] = top
    for j in range(value.shape[0]):
        value[j] /= top
    if form == UNIT:
        for j in range(value.shape[0]):
            out[row, j] = value[j]
        return
    for j in range(value.shape[0]):
        coarse = np.rint(value[j] * F32(COARSE)) / F32(COARSE)
        out[row, j] = coarse
        out[batch + row, j] = (value[j] - coarse) * F32(2 * COARSE)


@compiled
def add_norm(first, last, x, y, y_scale, bias, weight, eps, form, out, scale):
    """x [batch, hidden] += y (none if it has no rows); out = RMSNorm(x) * weight (arXiv 1910.07467)."""
    batch, hidden = x.shape
    value = np.empty(hidden, F32)
    for row in range(first, last):
        if y.shape[0]:
            _read(y, row, batch, y_scale, bias, 0, value)
            for j in range(hidden):
                x[row, j] += value[j]
        total = F32(0)
        for j in range(hidden):
            total += x[row, j] * x[row, j]
        root = F32(1) / np.sqrt(total / F32(hidden) + eps)
        for j in range(hidden):
            value[j] = x[row, j] * root * weight[j]
        _write(value, row, batch, form, out, scale)


@compiled
def silu_product(first, last, y, y_scale, bias, columns, form, out, scale):
    """out [batch, n] = silu(gate) * up * columns [n] of y [batch, 2 n], gate before up."""
    batch, n = y_scale.shape[0], y.shape[1] // 2
    gate, up = np.empty(n, F32), np.empty(n, F32)
    for row in range(first, last):
        _read(y, row, batch, y_scale, bias, 0, gate)
        _read(y, row, batch, y_scale, bias, n, up)
        for j in range(n):
            up[j] *= columns[j] * gate[j] / (F32(1) + exponential(min(-gate[j], F32(87))))
        _write(up, row, batch, form, out, scale)


@compiled
def _head(value, weight, eps, cos, sin, spare):
    """One head's value [head_dim] in place: its RMSNorm where there is a weight (Qwen3), then rotary embedding (arXiv 2104.09864)."""
    size = value.shape[0]
    if weight.shape[0]:
        total = F32(0)
        for j in range(size):
            total += value[j] * value[j]
        root = F32(1) / np.sqrt(total / F32(size) + eps)
        for j in range(size):
            value[j] = value[j] * root * weight[j]
    half = size // 2
    for j in range(half):
        spare[j] = value[j] * cos[j] - value[half + j] * sin[j]
        spare[half + j] = value[half + j] * cos[half + j] + value[j] * sin[half + j]
    value[:] = spare


@compiled
def _dots(q, keys, scores):
    """scores [group, n] = q [group, head_dim] times keys [n, head_dim]; four tokens at once, so that q is loaded once for them."""
    n, group, size = keys.shape[0], q.shape[0], q.shape[1]
    whole = n - n % 4
    for t in range(0, whole, 4):
        for g in range(group):
            one, two, three, four = F32(0), F32(0), F32(0), F32(0)
            for j in range(size):
                one += q[g, j] * keys[t, j]
                two += q[g, j] * keys[t + 1, j]
                three += q[g, j] * keys[t + 2, j]
                four += q[g, j] * keys[t + 3, j]
            scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3] = one, two, three, four
    for t in range(whole, n):
        for g in range(group):
            dot = F32(0)
            for j in range(size):
                dot += q[g, j] * keys[t, j]
            scores[g, t] = dot


@compiled
def _mix(shares, values, out):
    """out [group, head_dim] = shares [group, n] times values [n, head_dim]; four tokens at once, so that out is loaded and stored once for them."""
    n, group, size = values.shape[0], out.shape[0], out.shape[1]
    whole = n - n % 4
    for g in range(group):
        out[g, :] = F32(0)
    for t in range(0, whole, 4):
        for g in range(group):
            one, two, three, four = shares[g, t], shares[g, t + 1], shares[g, t + 2], shares[g, t + 3]
            for j in range(size):
                out[g, j] += one * values[t, j] + two * values[t + 1, j] + three * values[t + 2, j] + four * values[t + 3, j]
    for t in range(whole, n):
        for g in range(group):
            share = shares[g, t]
            for j in range(size):
                out[g, j] += share * values[t, j]


@compiled
def _sums(shares, values, out):
    """`_mix`, with its sums in registers where the CPU has enough."""
    group, size = out.shape
    if AVX512 and size % LANES == 0:
        for g in range(0, group, ROWS):
            for part in range(0, size, LANES):
                tile_of_floats(
                    values.ctypes.data + 4 * part, values.strides[0], shares.ctypes.data + g * shares.strides[0], shares.strides[0],
                    out.ctypes.data + g * out.strides[0] + 4 * part, out.strides[0], values.shape[0], min(ROWS, group - g))
    else:
        _mix(shares, values, out)


@compiled
def _attend(q, keys, values, scores, out):
    """out [group, head_dim]: softmax attention of the query heads q that share keys and values [n, head_dim]."""
    n, group = keys.shape[0], q.shape[0]
    _dots(q, keys, scores)
    for g in range(group):
        row = scores[g, :n]
        top = row[0]
        for t in range(n):
            top = max(top, row[t])
        total = F32(0)
        for t in range(n):
            row[t] = exponential(row[t] - top)
            total += row[t]
        for t in range(n):
            row[t] /= total
    _sums(scores, values, out)


@compiled
def attention(first, last, y, y_scale, bias, q_weight, k_weight, eps, cos, sin, starts, positions, kv, columns, form, out, scale):
    """Attention of one token per sequence over its own slot and nothing else, in place.

    y [batch, (heads + 2 kv_heads) * head_dim]: queries, keys, values of the new tokens. kv [2, kv_heads, budget, head_dim]:
    the layer's pool, into which the new K and V are written. starts, positions [batch]: the slot's first token and the
    new one's place after it. cos, sin [batch, head_dim]. columns [heads * head_dim]: factors of the output.
    out [batch, heads * head_dim].
    """
    batch, kv_heads, size = y_scale.shape[0], kv.shape[1], kv.shape[3]
    heads = y.shape[1] // size - 2 * kv_heads
    group = heads // kv_heads
    value, spare = np.empty(y.shape[1], F32), np.empty(size, F32)
    mixed = np.empty(heads * size, F32)
    longest = 0
    for row in range(first, last):
        longest = max(longest, positions[row] + 1)
    scores = np.empty((group, longest), F32)
    root = F32(1) / np.sqrt(F32(size))
    for row in range(first, last):
        _read(y, row, batch, y_scale, bias, 0, value)
        start, at = starts[row], starts[row] + positions[row]
        parts = value.reshape(heads + 2 * kv_heads, size)
        for h in range(heads):
            _head(parts[h], q_weight, eps, cos[row], sin[row], spare)
            for j in range(size):
                parts[h, j] *= root
        for h in range(kv_heads):
            _head(parts[heads + h], k_weight, eps, cos[row], sin[row], spare)
            kv[0, h, at] = parts[heads + h]
            kv[1, h, at] = parts[heads + kv_heads + h]
            _attend(parts[h * group:(h + 1) * group], kv[0, h, start:at + 1], kv[1, h, start:at + 1], scores,
                    mixed.reshape(heads, size)[h * group:(h + 1) * group])
        for j in range(mixed.shape[0]):
            mixed[j] *= columns[j]
        _write(mixed, row, batch, form, out, scale)


@compiled
def logits(first, last, y, y_scale, bias, out):
    """out [batch, vocab]: the head's output."""
    for row in range(first, last):
        _read(y, row, y_scale.shape[0], y_scale, bias, 0, out[row])
