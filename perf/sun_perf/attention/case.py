"""What is measured: one layer's attention of a decode step, from the output of its QKV layer to the input of its output layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TOLERANCE = 1e-5
"""Largest error against float64 of an output whose values are of the order of 1: some hundred roundings of float32."""
THETA = 100000.0
"""SmolLM2's base of the rotary embedding."""


@dataclass(frozen=True)
class Shape:
    """A layer's heads; SmolLM2-135M's by default."""

    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64

    @property
    def width(self) -> int:
        """Columns of the QKV layer's output."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


class Case:
    """``batch`` sequences whose tokens, the new one included, go evenly from ``context`` down to half of it, in ``layers`` layers of one shape.

    Both layouts of the same random K and V, the new token's place zero: kv [layers, 2, kv_heads, budget, head_dim], each sequence
    at its start, and padded [layers, 2, batch, kv_heads, context, head_dim]. y [batch, width] is the QKV layer's output.
    """

    def __init__(self, batch: int, context: int, layers: int, shape: Shape = Shape(), seed: int = 0):
        self.batch, self.context, self.layers, self.shape = batch, context, layers, shape
        rng = np.random.default_rng(seed)
        self.lengths = np.rint(np.linspace(context, (context + 1) // 2, batch)).astype(np.int64)
        self.positions = self.lengths - 1
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.y = rng.standard_normal((batch, shape.width), np.float32)
        self.kv = np.empty((layers, 2, shape.kv_heads, int(self.lengths.sum()), shape.head_dim), np.float32)
        self.kv[:] = rng.standard_normal(self.kv.shape[1:], np.float32)  # the layers' values may be the same, their memory must not
        angles = np.arange(context)[:, None] / THETA ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.cos_table, self.sin_table = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self.cos, self.sin = (np.tile(table[self.positions], 2) for table in (self.cos_table, self.sin_table))
        self.kv[:, :, :, self.starts + self.positions] = 0

    @cached_property
    def padded(self) -> np.ndarray:
        """K and V as they lie for kernels that want every sequence as long as the longest."""
        shape = self.shape
        made = np.zeros((self.layers, 2, self.batch, shape.kv_heads, self.context, shape.head_dim), np.float32)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            made[:, :, row, :, :length] = self.kv[:, :, :, start:start + length]
        return made

    def expected(self) -> np.ndarray:
        """The layer's output [batch, heads * head_dim] by its formula (arXiv 1706.03762, 2305.13245, 2104.09864) in float64."""
        shape, out = self.shape, []
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            parts = self.y[row].astype(np.float64).reshape(-1, shape.head_dim)
            low, high = np.split(parts, 2, axis=1)
            turned = parts * self.cos[row] + np.concatenate([-high, low], axis=1) * self.sin[row]
            keys, values = self.kv[0, :, :, start:start + length].astype(np.float64)
            keys[:, -1], values[:, -1] = turned[shape.heads:][:shape.kv_heads], parts[-shape.kv_heads:]
            queries = turned[:shape.heads].reshape(shape.kv_heads, -1, shape.head_dim)
            scores = queries @ keys.swapaxes(1, 2) / np.sqrt(shape.head_dim)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out.append((shares / shares.sum(-1, keepdims=True) @ values).reshape(-1))
        return np.stack(out)
