"""Linear layers with integers on both sides: what the codes of a weight and of its input stand for, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FINE, COARSE = 127, 63
"""Largest code of 8 and of 7 bits. x86's integer products saturate if both sides have 8, so one side of a layer has 7."""


@dataclass(frozen=True)
class Codes:
    """Integers on both sides of a layer. levels: the largest code of a weight, one scale per output row.

    Inputs are divided by their row's largest magnitude. split: they take two 7-bit codes, the second for what the first
    leaves, 14 bits in all, at the price of twice the rows; otherwise one 8-bit code.
    smooth: [in], powers of two by which inputs are divided first and weights multiplied, or None (see `smoothing`).
    whole: [in], True for columns in which inputs stay as they are (LLM.int8, arXiv 2208.07339), or None.
    """

    levels: int
    split: bool
    smooth: Tensor | None = None
    whole: Tensor | None = None

    def rounded(self, x: Tensor) -> Tensor:
        """The input x [..., in] as its codes stand for it, in float32."""
        if self.whole is not None:
            return torch.where(self.whole, x, self._rounded(x.masked_fill(self.whole, 0)))
        return self._rounded(x) if self.smooth is None else self._rounded(x / self.smooth) * self.smooth

    def _rounded(self, x: Tensor) -> Tensor:
        top = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        unit = x / top
        if not self.split:
            return (unit * FINE).round() / FINE * top
        coarse = (unit * COARSE).round() / COARSE
        rest = ((unit - coarse) * (2 * COARSE * COARSE)).round() / (2 * COARSE * COARSE)
        return (coarse + rest) * top

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [out, in] as its codes stand for it, in float32."""
        made = symmetric(self.smoothed(weight), self.levels)
        return made if self.smooth is None else made / self.smooth

    def smoothed(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that the codes are of."""
        return weight if self.smooth is None else weight * self.smooth


def row_scale(weight: Tensor, levels: int) -> Tensor:
    """Scale [out, 1] of symmetric codes up to ``levels`` of weight [out, in]."""
    return (weight.abs().amax(dim=1, keepdim=True) / levels).clamp_min(torch.finfo(torch.float32).tiny)


def integers(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Symmetric integer codes up to ``levels`` of weight [out, in], in its dtype, and their scale [out, 1]."""
    scale = row_scale(weight, levels)
    return (weight / scale).round().clamp(-levels, levels), scale


def symmetric(weight: Tensor, levels: int) -> Tensor:
    """What symmetric integer codes up to ``levels`` stand for, with one scale per output row."""
    codes, scale = integers(weight, levels)
    return codes * scale


def smoothing(weights: list[Tensor], ranges: Tensor) -> Tensor:
    """Per input column [in], what to move from the inputs to the weights, so that both are hit alike (SmoothQuant, arXiv 2211.10438, alpha 0.5).

    weights: of all layers [out, in] with this input. ranges: its columns' largest magnitudes [in]. Powers of two: then
    dividing and multiplying are exact, and the last bit of a range, which differs between CPUs, changes nothing.
    """
    top = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    factor = (ranges.clamp_min(1e-5) / top.clamp_min(1e-5)).sqrt().clamp_min(1e-4).log2()
    return torch.exp2((factor - factor.mean()).round())
