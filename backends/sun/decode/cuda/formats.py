"""Linear layers as a GPU runs them: weights in a number format, packed once on the device. A format is one class, see `table`."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.decode.cuda.linear_kernel import BY, CHUNK, PIECE, PIECES, run, tile_for
from sun.gpu import capability_missing
from sun.model.codes import FINE, Codes, integers
from sun.model.quantise import GROUP, int4_codes

FULLEST = torch.finfo(torch.float16).max


class Format(Protocol):
    """Parts [parts, batch, out], whose sum is y, of x [batch, in], without the bias.

    Made of a weight [out, in] on the device, the executor's dtype, and the layer's integer codes where its scheme has some.
    Who makes x multiplies it by ``columns`` [in] float32 (None: by nothing) and rounds it to ``takes``, float16 within its range.
    nbytes: of the weights as they lie, scales included: what a step reads of them.
    """

    columns: Tensor | None
    takes: torch.dtype
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

    columns = None

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        self.weight, self.takes, self.nbytes = weight.to(dtype), dtype, weight.numel() * dtype.itemsize

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


class Integers:
    """What layers of integers have in common; inputs are not rounded to integers, but to float16. bits: of a code."""

    bits: int
    takes = torch.float16

    def __init__(self, codes: Tensor, scales: Tensor, columns: Tensor):
        """codes [out, in], from 0 on; scales: see `sun.decode.cuda.linear_kernel.multiply`; columns: see `Format`."""
        outputs, inputs = codes.shape
        pieces = codes.int().view(outputs, -1, PIECES[self.bits], PIECE).transpose(0, 1)
        words = sum(pieces[:, :, i] << (self.bits * i) for i in range(PIECES[self.bits]))
        # By way of int16, because torch makes no uint16 of larger integers.
        self.codes = torch.where(words < 1 << 15, words, words - (1 << 16)).to(torch.int16).contiguous().view(torch.uint16)
        self.scales, self.columns, self.nbytes = scales.contiguous(), columns, self.codes.nbytes + scales.nbytes
        self.tiles = {rows: tile_for(outputs, inputs, self.bits, rows) for rows in (16, 32, 64)}

    def __call__(self, x: Tensor) -> Tensor:
        """See `Format`."""
        return run(x, self.codes, self.scales, self.bits, self.tiles)

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """As `Dense`."""
        return capability_missing(device, (8, 0))

    @classmethod
    def fits(cls, weight: Tensor) -> bool:
        """Whole steps of inputs, and places that 32 bits can count."""
        return weight.shape[1] % (PIECES[cls.bits] * PIECE) == 0 and weight.numel() < 1 << 31


class Int8(Integers):
    """8-bit integers with one scale per output row. Inputs are divided by ``codes.smooth`` first, where there is one."""

    bits = 8

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        levels, smooth = (codes.levels, codes.smooth) if codes else (FINE, None)
        weight = weight.float() if smooth is None else weight.float() * smooth.to(weight.device)
        numbers, scale = integers(weight, levels)
        even = torch.ones(weight.shape[1], device=weight.device) if smooth is None else 1 / smooth.to(weight.device)
        # Powers of two, so that multiplying is as exact as dividing.
        super().__init__(numbers + 128, scale.flatten() / BY, even * BY)


class Int4(Integers):
    """4-bit weights in groups of `GROUP` with a scale and a minimum each, both float16: 5 bits a weight."""

    bits = 4

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        outputs, inputs = weight.shape
        integers, scale, low = (part.view(outputs, inputs // GROUP, -1) for part in int4_codes(weight.float()))
        # In the kernel a code has 16 more.
        pairs = torch.cat((scale, low - 16 * scale), dim=-1).div_(BY).to(torch.float16).view(torch.int32)
        chunks = F.pad(pairs.view(outputs, -1), (0, 0, 0, -outputs % CHUNK)).view(-1, CHUNK, inputs // (PIECES[4] * PIECE), PIECES[4])
        scales = chunks.permute(2, 0, 3, 1).contiguous().view(torch.uint32)
        super().__init__(integers.view(outputs, inputs), scales, torch.full((inputs,), BY, device=weight.device))


def as_taken(x: Tensor, format: Format) -> Tensor:
    """x [batch, in] in the form in which ``format`` takes it."""
    x = x.float() if format.columns is None else x.float() * format.columns
    return (x.clamp(-FULLEST, FULLEST) if format.takes is torch.float16 else x).to(format.takes)
