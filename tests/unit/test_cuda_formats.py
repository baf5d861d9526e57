"""Low-bit layers of the CUDA executor, in Triton's interpreter on the CPU, against the numbers that their codes stand for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package; its interpreter needs no GPU")

from sun.decode.cuda.formats import Dense, Int4, Int8
from sun.decode.cuda.fp8 import Fp8
from sun.decode.cuda.linear_kernel import MOST_SPLITS, STEP, STEP4, tile_for
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


@pytest.mark.parametrize("dtype, least", [(torch.float32, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("rows", [5, 66])
def test_int4_stands_for_its_codes(rows, dtype, least):
    weight, x = made(0, OUTPUTS, INPUTS), made(1, rows, INPUTS).to(dtype)
    layer = Int4(weight, dtype)
    assert layer.parts > 1, "should try a layer whose inputs are split"
    assert error(layer(x), x, int4(weight)) < least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 66])
def test_int8_stands_for_its_codes(rows, dtype):
    weight, x = made(0, OUTPUTS, INPUTS), made(1, rows, INPUTS).to(dtype)
    # Codes are whole in bf16, and sums are in float32: nothing of either type is lost.
    assert error(Int8(weight, dtype)(x), x, symmetric(weight, FINE)) < 1e-5


def test_int8_takes_the_smoothing_of_the_module_it_was_tuned_with():
    smooth = torch.exp2(torch.randint(-3, 4, (INPUTS,), generator=torch.Generator().manual_seed(2)).float())
    codes, x = Codes(COARSE, split=False, smooth=smooth), made(1, 3, INPUTS).to(torch.bfloat16)
    weight = codes.weight(made(0, OUTPUTS, INPUTS).cpu())
    assert error(pack(weight.to(DEVICE), "int8", torch.bfloat16, codes)(x), x, weight.to(DEVICE)) < 1e-6


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_row_does_not_depend_on_its_neighbours(scheme):
    layer, x, others = pack(made(0, OUTPUTS, INPUTS), scheme, torch.bfloat16), *(made(i, 6, INPUTS).to(torch.bfloat16) for i in (1, 3))
    together, others[4] = layer(x), x[4]
    assert torch.equal(layer(others)[:, 4], together[:, 4])


@pytest.mark.parametrize("rows", [1, 5])
def test_fp8_rounds_both_sides_to_four_bits(rows):
    weight, x = made(0, OUTPUTS, INPUTS), made(1, rows, INPUTS).to(torch.bfloat16)
    # e4m3 keeps 4 bits: a share of 2^-4 on either side at most, and the signs of a thousand errors are apart.
    assert 0 < error(Fp8(weight, torch.bfloat16)(x), x, weight) < 2**-6


def test_layers_without_whole_steps_stay_dense_and_the_head_has_8_bits():
    assert isinstance(pack(made(0, 8, STEP4 + STEP), "int4", torch.float32), Dense)
    assert isinstance(pack(made(0, 8, STEP4), "int4", torch.float32, Codes(FINE, split=True)), Int8)


@pytest.mark.parametrize("step", [STEP, STEP4])
@pytest.mark.parametrize("inputs", [256, 1024, 4096, 12288, 14336])
@pytest.mark.parametrize("outputs", [8, 4096, 6144, 28672, 128256])
def test_every_split_has_inputs(outputs, inputs, step):
    tile, steps = tile_for(outputs, inputs, step), inputs // step
    share = -(-steps // tile.splits)
    assert 1 <= tile.splits <= MOST_SPLITS and (tile.splits - 1) * share < steps
