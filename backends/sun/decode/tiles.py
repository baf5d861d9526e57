"""Linear layers by kernels of our own, for one thread of a CPU with AVX-512: a decode step reads its weights at the speed of memory.

Weights lie in blocks of `LANES` outputs, input after input, so that a block is read from end to end (`sun.decode.vectors`). Batches of
more than a tile's rows find the block in the cache when they use it again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sun.decode.kernels import F32, PLAIN, SPLIT, UNIT, compiled
from sun.decode.vectors import AVX512, LANES, ROWS, TOGETHER, VNNI, tile_of_bytes, tile_of_floats, tile_of_halves
from sun.model.codes import COARSE, FINE, Codes, integers


@compiled
def _float_product(x, weights, halves, y):
    """y [rows, out] = x [rows, in] times weights [blocks, in, LANES], float32, or bf16 as integers."""
    rows, inputs = x.shape
    step, x_step, y_step = weights.strides[1], x.strides[0], y.strides[0]
    for block in range(weights.shape[0]):
        at = weights.ctypes.data + block * weights.strides[0]
        for row in range(0, rows, ROWS):
            given, out = x.ctypes.data + row * x_step, y.ctypes.data + row * y_step + 4 * LANES * block
            if halves:
                tile_of_halves(at, step, given, x_step, out, y_step, inputs, min(ROWS, rows - row))
            else:
                tile_of_floats(at, step, given, x_step, out, y_step, inputs, min(ROWS, rows - row))


@compiled
def _byte_product(x, levels, weights, scale, shift, y):
    """y [rows, out] = x [rows, in], as codes up to ``levels``, times weights [blocks, in / TOGETHER, LANES * TOGETHER] int8, times scale [out].

    The codes are unsigned, their zero in the middle: shift [out] is what that adds to a sum.
    """
    rows, inputs = x.shape
    codes = np.empty((rows, inputs), np.uint8)
    for row in range(rows):
        for j in range(inputs):
            codes[row, j] = np.uint8(np.int32(np.rint(x[row, j] * F32(levels))) + np.int32(levels + 1))
    totals = np.empty((ROWS, LANES), np.int32)
    for block in range(weights.shape[0]):
        at, first = weights.ctypes.data + block * weights.strides[0], block * LANES
        for row in range(0, rows, ROWS):
            count = min(ROWS, rows - row)
            tile_of_bytes(at, weights.strides[1], codes.ctypes.data + row * inputs, inputs, totals.ctypes.data, 4 * LANES, weights.shape[1], count)
            for r in range(count):
                for j in range(LANES):
                    y[row + r, first + j] = F32(totals[r, j] - shift[first + j]) * scale[first + j]


def _blocks(weight: Tensor, together: int = 1) -> np.ndarray:
    """weight [out, in] as [out / LANES, in / together, LANES * together]: ``together`` inputs of an output are side by side."""
    out, inputs = weight.shape
    return weight.reshape(out // LANES, LANES, inputs // together, together).transpose(1, 2).reshape(out // LANES, inputs // together, -1).contiguous().numpy()


class Tiles:
    """float32 weights, or ``halves``: bf16's, of a weight [out, in] that has no more than that."""

    form = PLAIN

    def __init__(self, weight: Tensor, halves: bool = False):
        self._out, self._halves = len(weight), halves
        self._weights = _blocks(weight.bfloat16().view(torch.int16) if halves else weight)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether a weight [out, in] has a shape for tiles, and this CPU the registers."""
        return AVX512 and weight.shape[0] % LANES == 0

    def __call__(self, x: Tensor) -> Tensor:
        """See `sun.decode.packed.Packed`."""
        y = torch.empty(len(x), self._out)
        _float_product(x.numpy(), self._weights, self._halves, y.numpy())
        return y


class Int8Tiles:
    """8-bit integers both ways: exact sums, whatever the codes are."""

    def __init__(self, weight: Tensor, codes: Codes):
        self.form = SPLIT if codes.split else UNIT
        self._levels = COARSE if codes.split else FINE
        numbers, scale = integers(codes.smoothed(weight), codes.levels)
        numbers = numbers.to(torch.int8)
        self._weights, self._scale = _blocks(numbers, TOGETHER), (scale.flatten() / self._levels).numpy()
        self._shift = (numbers.sum(1, dtype=torch.int32) * (self._levels + 1)).numpy()

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether the integers of a weight [out, in] have a shape for tiles, and this CPU the instructions."""
        return VNNI and Tiles.fits(weight) and weight.shape[1] % TOGETHER == 0

    def __call__(self, x: Tensor) -> Tensor:
        """See `sun.decode.packed.Packed`."""
        y = torch.empty(len(x), len(self._scale))
        _byte_product(x.numpy(), self._levels, self._weights, self._scale, self._shift, y.numpy())
        return y
