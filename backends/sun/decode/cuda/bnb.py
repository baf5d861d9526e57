"""bitsandbytes' NormalFloat4 on a GPU, where the package is installed."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from sun.gpu import capability_missing
from sun.model.codes import Codes

BLOCK = 64
"""Weights in a row that share a scale, as `sun.model.quantise.nf4` has it."""


class BnbNf4:
    """4-bit codes, fused with the product for one row; for more rows bitsandbytes makes bf16 weights of them first."""

    parts = 1

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        from bitsandbytes.functional import quantize_4bit

        self.weight, self.state = quantize_4bit(weight.to(dtype).contiguous(), blocksize=BLOCK, quant_type="nf4")
        self.nbytes = self.weight.nbytes + self.state.absmax.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See `sun.decode.cuda.formats.Format`."""
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.weight.t(), quant_state=self.state)[None]

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """A package of its own."""
        if importlib.util.find_spec("bitsandbytes") is None:
            return "the bitsandbytes package is not installed"
        return "this one is for GPUs" if device.type != "cuda" else capability_missing(device, (8, 0))

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whole blocks in a row."""
        return weight.shape[1] % BLOCK == 0
