"""A prefill module's linear layers as integers, by the decode step's packed layers: a shorter pass, and so a lower TTFT."""

from __future__ import annotations

import torch
from torch import Tensor

from sun.decode.compiling import first_run
from sun.decode.kernels import SPLIT, UNIT
from sun.decode.packed import pack
from sun.model.codes import COARSE
from sun.model.llama import Llama
from sun.model.weights import Linear


class IntegerLinear:
    """y = x W^T (+ b) of x [tokens, in], with a layer's integer codes (`sun.model.codes`) packed; its weights can be let go. alone: see `pack`."""

    def __init__(self, linear: Linear, scheme: str, alone: bool):
        self.packed, self.bias = pack(linear.weight, scheme, linear.codes, alone), linear.bias
        smooth = linear.codes.smooth
        self.divided = None if smooth is None else 1 / smooth

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.divided is None else x * self.divided
        if self.packed.form not in (UNIT, SPLIT):
            y = self.packed(x)
            return y if self.bias is None else y + self.bias
        # What `sun.decode.kernels` does before and after a layer, for many rows at once.
        top = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        x = x / top
        if self.packed.form == SPLIT:
            coarse = (x * COARSE).round_().div_(COARSE)
            y, rest = self.packed(torch.cat((coarse, (x - coarse).mul_(2 * COARSE)))).chunk(2)
            y = rest.div_(2 * COARSE).add_(y)
        else:
            y = self.packed(x)
        y = y.mul_(top)
        return y if self.bias is None else y.add_(self.bias)


def pack_linears(model: Llama, alone: bool) -> None:
    """Put packed layers in the place of those that K and V depend on. alone: one thread runs them. Raises what `pack` raises for the model's scheme."""
    for layer in model.layers:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            setattr(layer, name, IntegerLinear(getattr(layer, name), model.scheme, alone))
    first_run(lambda: model.layers[0].q(torch.zeros(1, model.base.hidden)))
