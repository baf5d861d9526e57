"""Linear layers as the CPU runs them fastest: weights packed once, in a number format. A format is one class.

One thread of a CPU with AVX-512 has kernels of our own (`sun.decode.tiles`); several threads, and other CPUs, those of torch's libraries.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sun.decode.bnb import BnbInt8, BnbNf4
from sun.decode.kernels import PLAIN, SPLIT, UNIT
from sun.decode.tiles import Int8Tiles, Tiles
from sun.model.codes import COARSE, FINE, Codes, row_scale
from sun.model.quantise import GROUP, codes_for, int4_codes

BATCH_HINT = 16
"""oneDNN lays weights out for an expected number of rows; the layout hardly depends on it."""
LEAST_ROWS = 6 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1
"""oneDNN's AVX-512 kernels take 6 rows at once: fewer are slower (2 rows by half), and one alone is summed in another order. Those for AVX2 have neither fault."""


class Packed(Protocol):
    """y [rows, out] of x [rows, in], without the bias, in float32.

    form: how x is to be written, see `sun.decode.kernels`.
    """

    form: int

    def __call__(self, x: Tensor) -> Tensor: ...


class OneDnn:
    """float32 in oneDNN's blocked layout: a third faster than the plain one, and a row's bits do not depend on the batch."""

    form = PLAIN

    def __init__(self, weight: Tensor):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), BATCH_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Packed`."""
        rows = len(x)
        if rows < LEAST_ROWS:
            x = torch.nn.functional.pad(x, (0, 0, 0, LEAST_ROWS - rows))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")[:rows]


class Plain:
    """float32 as it is, where torch has no oneDNN."""

    form = PLAIN

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """See `Packed`."""
        return torch.nn.functional.linear(x, self.weight)


class Int8:
    """8-bit integers both ways, by fbgemm: exact, because the codes are chosen so that its 16-bit sums of two products never saturate."""

    def __init__(self, weight: Tensor, codes: Codes):
        self.form = SPLIT if codes.split else UNIT
        # Activations are unsigned here: the zero point is in the middle.
        self.levels, self.zero = (COARSE, COARSE + 1) if codes.split else (FINE, FINE + 1)
        weight = codes.smoothed(weight)
        scale = row_scale(weight, codes.levels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch will drop these tensors one day; the pinned one packs from nothing else
            integers = torch.quantize_per_channel(weight, scale.double().flatten(), torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)
        before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
        try:
            self.weight = torch.ops.quantized.linear_prepack(integers, None)
        finally:
            torch.backends.quantized.engine = before

    def __call__(self, x: Tensor) -> Tensor:
        """See `Packed`."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / self.levels, self.zero, self.weight)


class Half:
    """bf16 weights with float32 inputs, by fbgemm's kernel for float16: on AVX2 nothing in torch multiplies bf16 as fast.

    float16 holds a bf16 number up to `LARGEST` exactly, and one below 6e-5 to 3e-8, which is what float32 sums are off by, too.
    fbgemm fills the inputs up to a multiple of `FILLED`; a few beyond one are a layer of their own by ``floats``, which takes less memory.
    """

    form = PLAIN
    LARGEST = torch.finfo(torch.float16).max
    FILLED = 512

    def __init__(self, weight: Tensor, floats: Callable[[Tensor], Packed]):
        inputs = weight.shape[1]
        beyond = inputs % self.FILLED if inputs > self.FILLED else 0
        self.inputs = inputs - beyond if beyond * 2 < self.FILLED else inputs
        self.weight = torch.ops.quantized.linear_prepack_fp16(weight[:, : self.inputs].contiguous(), None)
        self.rest = floats(weight[:, self.inputs :].contiguous()) if self.inputs < inputs else None

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether float16 holds a weight, and this CPU gives a row the same bits in any company."""
        return bool(weight.abs().max() <= Half.LARGEST) and keeps_rows_apart()

    def __call__(self, x: Tensor) -> Tensor:
        """See `Packed`."""
        y = torch.ops.quantized.linear_dynamic_fp16(x[:, : self.inputs], self.weight)
        return y if self.rest is None else y.add_(self.rest(x[:, self.inputs :]))


@functools.cache
def keeps_rows_apart() -> bool:
    """Whether fbgemm's float16 kernel gives a row the same bits whatever rows come with it. An EPYC of the first generation (7001) does not."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.ops.quantized.linear_prepack_fp16(torch.randn(48, 64, generator=draw), None)
    x = torch.randn(8, 64, generator=draw)
    single = torch.cat([torch.ops.quantized.linear_dynamic_fp16(row, weight) for row in x.split(1)])
    return all(torch.equal(torch.ops.quantized.linear_dynamic_fp16(x[:rows], weight), single[:rows]) for rows in range(2, 9))


class Int4:
    """4-bit weights in groups of `GROUP`, activations in bf16, by torch's own kernel (float32 activations are slower than float32 weights there)."""

    form = PLAIN

    def __init__(self, weight: Tensor):
        codes, scale, low = int4_codes(weight)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).view_as(weight), 1)
        # The kernel takes (code - 8) * scale + zero.
        self.scales = torch.cat((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Packed`."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), self.weight, GROUP, self.scales).float()


def pack(weight: Tensor, scheme: str, codes: Codes | None, alone: bool = False) -> Packed:
    """A layer's reference weight [out, in] (see `sun.model.quantise`) in its fastest form.

    codes: its integers, if its scheme has them. alone: one thread runs the layer.
    """
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines

    def floats(weight: Tensor) -> Packed:
        if alone and Tiles.fits(weight):
            return Tiles(weight)
        return OneDnn(weight) if torch.backends.mkldnn.is_available() else Plain(weight)

    if codes is not None and codes.whole is not None:
        return BnbInt8(weight, codes, floats)
    if codes is not None and alone and Int8Tiles.fits(weight):
        return Int8Tiles(weight, codes)
    if codes is not None and fbgemm:
        return Int8(weight, codes)
    if scheme == "bf16" and alone and Tiles.fits(weight):
        return Tiles(weight, halves=True)
    if scheme == "bf16" and fbgemm and Half.fits(weight):
        return Half(weight, floats)
    if scheme == "bnb-nf4" and codes is None and BnbNf4.fits(weight):
        return BnbNf4(weight)
    if scheme == "int4" and codes is None and weight.shape[0] % 16 == 0 and weight.shape[1] % GROUP == 0:
        return Int4(weight)
    return floats(weight)


def why_not(scheme: str) -> str | None:
    """What keeps a scheme's layers from running here; None if nothing does."""
    try:
        pack(torch.eye(64), scheme, codes_for(scheme, "mlp.up_proj", torch.ones(64)))(torch.ones(2, 64))
    except Exception as error:  # whatever it is, this machine's packages or CPU are the cause
        return str(error)
    return None
