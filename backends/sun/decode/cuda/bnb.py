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
    """4-bit codes. Version 0.50.2 multiplies by them as they lie for up to 4 rows, and for more by the layer's size and the GPU; else it
    makes weights in x's type first."""

    columns = None

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        from bitsandbytes.functional import quantize_4bit

        self.weight, self.state = quantize_4bit(weight.to(dtype).contiguous(), blocksize=BLOCK, quant_type="nf4")
        self.takes, self.nbytes = dtype, self.weight.nbytes + self.state.absmax.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See `sun.decode.cuda.formats.Format`."""
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.weight.t(), quant_state=self.state)[None]

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """A package of its own, and its library for this CUDA, without which it imports all the same."""
        if importlib.util.find_spec("bitsandbytes") is None:
            return "the bitsandbytes package is not installed"
        if device.type != "cuda":
            return "this one is for GPUs"
        from bitsandbytes.cextension import lib

        if not lib.compiled_with_cuda:
            return f"bitsandbytes has no library that loads here for CUDA {torch.version.cuda}; `python -m bitsandbytes` tells more"
        return capability_missing(device, (8, 0))

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whole blocks in a row."""
        return weight.shape[1] % BLOCK == 0
