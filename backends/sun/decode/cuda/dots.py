"""In which type Triton multiplies matrices here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def interpreted() -> bool:
    """Whether Triton-language kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What operands of ``dtype`` are multiplied as. The interpreter takes bf16 for integers there, so it gets the same numbers in float32."""
    return tl.bfloat16 if dtype is torch.bfloat16 and not interpreted() else tl.float32
