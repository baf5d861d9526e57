"""bitsandbytes' 8-bit and NF4 linear layers on the CPU, as formats of `sun.decode.packed`. The package is imported when one is made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from sun.decode.kernels import PLAIN
from sun.model.codes import Codes
from sun.model.quantise import BLOCK

ALIKE = 4
"""From this many rows on, torch's float32 product gives a row the same bits whatever else is in it; fewer take other kernels."""


def bitsandbytes(scheme: str) -> ModuleType:
    """The package. Raises RuntimeError naming it and the scheme that needs it."""
    # It has a kernel of its own for this CPU, and warns that a further package would fetch another one from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise RuntimeError(f"scheme {scheme} needs the package bitsandbytes: pip install --no-deps bitsandbytes (the version of requirements-nodeps.txt)") from error
    return bitsandbytes


class BnbInt8:
    """LLM.int8 (arXiv 2208.07339): 8 bits both ways, and columns with outliers apart, as floats.

    Which columns is known from calibration, not looked for in each batch as bitsandbytes does: a sequence's result would
    depend on its company's outliers. Without AVX-512 bitsandbytes multiplies the integers as float32: exact, and slow.
    floats: makes the layer of those columns, of its weight.
    """

    form = PLAIN

    def __init__(self, weight: Tensor, codes: Codes, floats: Callable[[Tensor], Callable[[Tensor], Tensor]]):
        bitsandbytes("bnb-int8")
        self._ops = torch.ops.bitsandbytes
        self.weight, self.scale, _ = self._ops.int8_vectorwise_quant(weight)
        self.columns = codes.whole.nonzero().flatten()
        self.rest = floats(weight[:, self.columns].contiguous()) if len(self.columns) else None

    def __call__(self, x: Tensor) -> Tensor:
        """See `Packed`."""
        even = x if self.rest is None else x.index_fill(1, self.columns, 0)
        codes, scale, _ = self._ops.int8_vectorwise_quant(even)
        y = self._ops.int8_scaled_mm(codes, self.weight, scale, self.scale, dtype=torch.float32)
        if self.rest is not None:
            y += self.rest(x[:, self.columns])
        return y


class BnbNf4:
    """NormalFloat4 as it is, 4.5 bits a weight: multiplied in bf16 where the CPU has AVX512_BF16, else dequantised in every step.

    Its table and its blocks are `sun.model.quantise.nf4`'s, so the codes are the same.
    """

    form = PLAIN

    def __init__(self, weight: Tensor):
        library = bitsandbytes("bnb-nf4")
        out, inputs = weight.shape
        self.layer = library.nn.Linear4bit(inputs, out, bias=False, compress_statistics=False, quant_type="nf4", device="meta").eval()
        self.layer.weight = library.nn.Params4bit(weight, requires_grad=False, blocksize=BLOCK, compress_statistics=False, quant_type="nf4").cpu()
        self.own_kernel = self.layer.support_avx512bf16_for_cpu
        self.layer.compute_dtype, self.layer.compute_type_is_set = torch.bfloat16 if self.own_kernel else torch.float32, True

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether a weight [out, in] has a shape that its kernels take."""
        return weight.shape[0] % 32 == 0 and weight.shape[1] % BLOCK == 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """See `Packed`."""
        if self.own_kernel or len(x) >= ALIKE:
            return self.layer(x)
        return self.layer(torch.cat((x, x.new_zeros(ALIKE - len(x), x.shape[1]))))[: len(x)]
