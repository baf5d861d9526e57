"""Low-bit layers of the CUDA executor, in Triton's interpreter on the CPU, against the numbers that their codes stand for."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package; its interpreter needs no GPU")

from sun.decode.cuda.formats import Dense, Int4, Int8, as_taken
from sun.decode.cuda.fp8 import Fp8
from sun.decode.cuda.layer_kernels import silu_product
from sun.decode.cuda.linear_kernel import MOST_SPLITS, PIECE, PIECES, tile_for
from sun.decode.cuda.table import pack
from sun.model.codes import COARSE, FINE, Codes, symmetric
from sun.model.quantise import int4

from ..conftest import DEVICE

OUTPUTS, INPUTS = 80, 2048


def made(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Largest error of a layer's output, as a share of what its products could add up to."""
    expected, largest = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert got.shape[1:] == expected.shape and got.isfinite().all()
    return float(((got.double().sum(0) - expected).abs() / largest).max())


def output(layer, x: torch.Tensor) -> torch.Tensor:
    return layer(as_taken(x, layer))


@pytest.mark.parametrize("rows", [5, 30, 66])
def test_int4_stands_for_its_codes(rows):
    weight, x = made(0, OUTPUTS, INPUTS), made(1, rows, INPUTS).to(torch.bfloat16)
    got = output(Int4(weight, torch.bfloat16), x)
    assert len(got) > 1, "should try a layer whose inputs are split"
    assert error(got, x, int4(weight)) < 2**-11


@pytest.mark.parametrize("inputs", [INPUTS, 3 * 64], ids=["two steps at once", "one"])
@pytest.mark.parametrize("rows", [1, 66])
def test_int8_stands_for_its_codes(rows, inputs):
    weight, x = made(0, OUTPUTS, inputs), made(1, rows, inputs).to(torch.bfloat16)
    # Codes and inputs are whole in float16, but for inputs near 0, and sums are in float32.
    assert error(output(Int8(weight, torch.bfloat16), x), x, symmetric(weight, FINE)) < 1e-6


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-2, 1e4, 1e6])
def test_small_and_large_inputs_have_room(scheme, size):
    layer, x = pack(made(0, OUTPUTS, INPUTS), scheme, torch.bfloat16), made(1, 3, INPUTS).clamp(-1, 1) * size
    assert error(output(layer, x), x, (int4 if scheme == "int4" else partial(symmetric, levels=FINE))(made(0, OUTPUTS, INPUTS))) < 2**-10


def test_what_is_made_for_a_layer_keeps_within_float16_and_what_is_no_number_stays_none():
    gate = torch.tensor([[[1e6, 1e6, float("nan"), 2.0]]], device=DEVICE)
    up = torch.tensor([[[1e6, -1e6, 1.0, 1.0]]], device=DEVICE)
    out = torch.empty(1, 4, dtype=torch.float16, device=DEVICE)
    silu_product[1, 1](torch.cat((gate, up), -1), None, None, out, 1, 4, PARTS=1, BIAS=False, COLUMNS=False, BLOCK=16)
    most = torch.finfo(torch.float16).max
    assert out[0, :2].tolist() == [most, -most] and out[0, 2].isnan() and abs(float(out[0, 3]) - 1.7616) < 1e-3


def test_int8_takes_the_smoothing_of_the_module_it_was_tuned_with():
    smooth = torch.exp2(torch.randint(-3, 4, (INPUTS,), generator=torch.Generator().manual_seed(2)).float())
    codes, x = Codes(COARSE, split=False, smooth=smooth), made(1, 3, INPUTS).to(torch.bfloat16)
    weight = codes.weight(made(0, OUTPUTS, INPUTS).cpu())
    assert error(output(pack(weight.to(DEVICE), "int8", torch.bfloat16, codes), x), x, weight.to(DEVICE)) < 1e-6


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours(scheme):
    layer, x, others = pack(made(0, OUTPUTS, INPUTS), scheme, torch.bfloat16), *(made(i, 6, INPUTS).to(torch.bfloat16) for i in (1, 3))
    together, others[4] = output(layer, x), x[4]
    assert torch.equal(output(layer, others)[:, 4], together[:, 4])


@pytest.mark.parametrize("rows", [1, 5])
def test_fp8_rounds_both_sides_to_four_bits(rows):
    weight, x = made(0, OUTPUTS, INPUTS), made(1, rows, INPUTS).to(torch.bfloat16)
    # e4m3 keeps 4 bits: a share of 2^-4 on either side at most, and the signs of a thousand errors are apart.
    assert 0 < error(Fp8(weight, torch.bfloat16)(x), x, weight) < 2**-6


def test_layers_without_whole_steps_stay_dense_and_the_head_has_8_bits():
    assert isinstance(pack(made(0, 8, 128 + 64), "int4", torch.float32), Dense)
    assert isinstance(pack(made(0, 8, 128), "int4", torch.float32, Codes(FINE, split=True)), Int8)


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("bits, inputs", [(8, 192), *((bits, inputs) for bits in (8, 4) for inputs in (256, 1024, 4096, 12288, 14336))])
@pytest.mark.parametrize("outputs", [8, 4096, 6144, 28672, 128256])
def test_tiles_cover_all_inputs_and_every_split_has_some(outputs, inputs, bits, rows):
    step, tile = PIECES[bits] * PIECE, tile_for(outputs, inputs, bits, rows)
    steps = inputs // (step * tile.unroll)
    share = -(-steps // tile.splits)
    assert steps * step * tile.unroll == inputs and 1 <= tile.splits <= MOST_SPLITS and (tile.splits - 1) * share < steps
