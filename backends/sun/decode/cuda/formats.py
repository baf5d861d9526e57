"""Linear layers as a GPU runs them: weights in a number format, packed once on the device. A format is one class, see `table`."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.decode.cuda.linear_kernel import STEP, STEP4, run, tile_for
from sun.gpu import capability_missing
from sun.model.codes import FINE, Codes, integers
from sun.model.quantise import GROUP, int4_codes

SHARED_BYTES = 140 << 10
"""Shared memory that a program of 128 outputs and 64 rows takes for 4-bit codes, as compiled for an H100."""


class Format(Protocol):
    """Parts [parts, batch, out], whose sum is y, of x [batch, in], without the bias; x in the executor's dtype.

    Made of a weight [out, in] on the device, the executor's dtype, and the layer's integer codes where its scheme has some.
    parts: how many. nbytes: of the weights as they lie, scales included: what a step reads of them.
    """

    parts: int
    nbytes: int

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None): ...

    def __call__(self, x: Tensor) -> Tensor: ...

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why ``device`` cannot run it; None if it can."""

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether it takes a weight of this size; other layers stay dense."""


class Dense:
    """Weights in the executor's dtype, by cuBLAS; bf16's sums come in float32."""

    parts = 1

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        self.weight, self.nbytes = weight.to(dtype), weight.numel() * dtype.itemsize

    def __call__(self, x: Tensor) -> Tensor:
        """See `Format`."""
        if x.is_cuda and x.dtype is not torch.float32:
            return torch.mm(x, self.weight.t(), out_dtype=torch.float32)[None]
        return F.linear(x, self.weight)[None]

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Runs on all that have bf16: compute capability 8.0."""
        return capability_missing(device, (8, 0))

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Any."""
        return True


class Int8:
    """8-bit integers with one scale per output row. Inputs stay as they are, but for what they are divided by first (``codes.smooth``)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        outputs, inputs = weight.shape
        levels, smooth = (codes.levels, codes.smooth) if codes else (FINE, None)
        weight = weight.float() if smooth is None else weight.float() * smooth.to(weight.device)
        numbers, scale = integers(weight, levels)
        self.codes = numbers.to(torch.int8).view(outputs, inputs // STEP, STEP).transpose(0, 1).contiguous()
        # Powers of two, so that multiplying is as exact as dividing.
        self.scales, self.columns = scale.flatten(), None if smooth is None else (1 / smooth).to(weight.device)
        self.outputs, self.tile = outputs, tile_for(outputs, inputs, STEP)
        self.parts, self.nbytes = self.tile.splits, self.codes.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See `Format`."""
        return run(x, self.codes, self.scales, self.columns, self.outputs, self.tile)

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """As `Dense`."""
        return capability_missing(device, (8, 0))

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whole steps of inputs, and places that 32 bits can count."""
        return weight.shape[1] % STEP == 0 and weight.numel() < 1 << 31


class Int4:
    """4-bit weights in groups of `GROUP` with a scale and a zero point each, both float16: 5 bits a weight. Inputs stay as they are."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        outputs, inputs = weight.shape
        integers, scale, low = int4_codes(weight.float())
        # [steps, out, 8 groups, 32] -> words of one code a group; bits are added in int64, because torch shifts no uint32.
        steps = integers.view(outputs, inputs // STEP4, 8, GROUP).transpose(0, 1)
        words = sum(steps[:, :, group].long() << (4 * group) for group in range(8))
        self.codes = torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32).contiguous().view(torch.uint32)
        # [groups, out, 2] of 16 bits, each pair read as one word.
        self.scales = torch.cat((scale, low + 8 * scale), dim=-1).transpose(0, 1).to(torch.float16).contiguous().view(torch.uint32)
        self.outputs, self.tile = outputs, tile_for(outputs, inputs, STEP4)
        self.parts, self.nbytes = self.tile.splits, self.codes.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See `Format`."""
        return run(x, self.codes, self.scales, None, self.outputs, self.tile)

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """As `Dense`, and room for what is read ahead at 64 rows."""
        if device.type == "cuda" and (room := torch.cuda.get_device_properties(device).shared_memory_per_block_optin) < SHARED_BYTES:
            return f"needs {SHARED_BYTES >> 10} KiB of shared memory a program, {torch.cuda.get_device_name(device)} has {room >> 10}"
        return capability_missing(device, (8, 0))

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """As `Int8`, with steps of its own."""
        return weight.shape[1] % STEP4 == 0 and weight.numel() < 1 << 31
