"""bitsandbytes' layers against what their codes stand for, and what is said where the package is missing."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.decode.bnb import BnbInt8, BnbNf4
from sun.decode.packed import OneDnn, pack, why_not
from sun.model.quantise import NF4, codes_for, nf4

rows = st.integers(1, 9)
seeds = st.integers(0, 999)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["own kernel", "dequantised"])
def nf4_layer(request, monkeypatch):
    """Makes NF4 layers, as on CPUs with and without AVX512_BF16."""
    modules = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn.modules
    if not request.param:
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    elif not modules.has_avx512bf16():
        pytest.skip("this CPU has no AVX512_BF16")
    return lambda weight: pack(weight, "bnb-nf4", None)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_nf4_layers_stand_for_our_codes_in_an_eighth_of_the_memory(nf4_layer, rows):
    weight, x = nf4(random(0, 96, 192) * 0.05), random(1, rows, 192)
    layer = nf4_layer(weight)
    y = layer(x)
    # bf16 has 8 bits: inputs and scales are rounded to them.
    worst = 2**-8 if layer.own_kernel else 1e-6
    assert ((y - x @ weight.T).abs() / (x.abs() @ weight.abs().T)).max() < worst
    assert layer.layer.weight.data.nbytes * 8 == weight.nbytes
    assert all(torch.equal(layer(x[i : i + 1])[0], y[i]) for i in range(rows))


def test_our_table_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), NF4)


def test_shapes_that_its_kernels_do_not_take_run_dequantised():
    assert isinstance(pack(nf4(random(0, 48, 128)), "bnb-nf4", None), OneDnn)
    assert not BnbNf4.fits(torch.empty(64, 96))


@given(rows, seeds, st.integers(0, 64))
def test_int8_layers_are_their_codes_with_outliers_whole(rows, seed, outliers):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    whole = torch.zeros(64, dtype=torch.bool)
    whole[torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:outliers]] = True
    codes = codes_for("bnb-int8", "mlp.up_proj", whole)
    weight, x = codes.weight(random(seed, 32, 64)), random(seed + 1, rows, 64)
    x[:, whole] *= 50
    layer, kept = pack(weight, "bnb-int8", codes), codes.rounded(x)
    assert isinstance(layer, BnbInt8)
    # A code that lies between two may fall to either side; bitsandbytes' 1 / 127^2 is off by 2e-5.
    code = x.masked_fill(whole, 0).abs().amax(1, keepdim=True) / 127 * weight.abs().amax()
    assert ((layer(x) - kept @ weight.T).abs() <= (kept.abs() @ weight.abs().T) * 3e-5 + 1.01 * code).all()
    assert torch.equal(kept[:, whole], x[:, whole])
    assert not layer(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("scheme", ["bnb-int8", "bnb-nf4"])
def test_a_missing_package_is_named_with_its_scheme(monkeypatch, scheme):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "bitsandbytes" in (why := why_not(scheme)) and scheme in why
    assert why_not("int4") is why_not("bf16") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the library for CUDA loads here")
def test_a_package_whose_cuda_library_does_not_load_is_told_from_one_that_runs():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    table = pytest.importorskip("sun.decode.cuda.table", reason="needs the triton package")
    assert "no library that loads here" in table.FORMATS["bnb-nf4"].missing(torch.device("cuda"))
