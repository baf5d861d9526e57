"""The number formats that the CUDA executor has, by scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from sun.decode.cuda.bnb import BnbNf4
from sun.decode.cuda.formats import Dense, Format, Int4, Int8
from sun.decode.cuda.fp8 import Fp8
from sun.model.codes import Codes

FORMATS: dict[str, type[Format]] = {"fp32": Dense, "bf16": Dense, "int8": Int8, "int4": Int4, "fp8": Fp8, "bnb-nf4": BnbNf4}
"""Scheme -> class of its linear layers."""


def dtype_of(scheme: str) -> torch.dtype:
    """What a scheme's activations and K and V are kept in."""
    return torch.float32 if scheme == "fp32" else torch.bfloat16


def pack(weight: Tensor, scheme: str, dtype: torch.dtype, codes: Codes | None = None) -> Format:
    """A layer's weight [out, in], on its device, by ``scheme``; codes: its integers, if its scheme has them."""
    kind = FORMATS[scheme] if codes is None else Int8
    return kind(weight, dtype, codes) if kind.fits(weight) else Dense(weight, dtype)


def head_scheme(scheme: str) -> str:
    """That of the head: 8 bits in every low-bit scheme (`sun.model.quantise.codes_for`), and sums in float32, since bf16's would make logits equal."""
    return scheme if scheme in ("fp32", "bf16") else "int8"
