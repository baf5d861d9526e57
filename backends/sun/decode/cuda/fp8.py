"""8-bit floats on both sides of a layer (e4m3), with a scale per row of each, by torch's kernel for Hopper and later."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sun.gpu import capability_missing
from sun.model.codes import Codes

LARGEST = 448.0
"""Of e4m3 (arXiv 2209.05433)."""
MULTIPLE = 16
"""Of inputs and of outputs, which the kernel needs."""


@triton.jit
def round_rows(x, out, scales, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """out [batch, width] e4m3 = x / scales, scales [batch] such that a row's largest magnitude is the format's. Grid: batch."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-20) / LARGEST
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, (value / scale).to(tl.float8e4nv), mask=at < width)


class Fp8:
    """Sums come in bf16: torch's kernel with a scale per row has no other output."""

    columns = None

    def __init__(self, weight: Tensor, dtype: torch.dtype, codes: Codes | None = None):
        weight = weight.float()
        scales = weight.abs().amax(1, keepdim=True).clamp_min(1e-20) / LARGEST
        self.weight, self.scales = (weight / scales).to(torch.float8_e4m3fn), scales.t().contiguous()
        self.takes, self.nbytes = dtype, self.weight.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See `sun.decode.cuda.formats.Format`."""
        batch, width = x.shape
        rounded = torch.empty(batch, width, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(batch, 1, dtype=torch.float32, device=x.device)
        round_rows[(batch,)](x, rounded, scales, width, LARGEST=LARGEST, BLOCK=triton.next_power_of_2(width), num_warps=8)
        return torch._scaled_mm(rounded, self.weight.t(), scales, self.scales, out_dtype=torch.bfloat16, use_fast_accum=True)[None]

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Scales per row need Hopper's instructions."""
        return capability_missing(device, (9, 0))

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Sizes that its kernel takes."""
        return not (weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE)
