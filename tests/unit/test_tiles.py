"""Linear layers and sums by tiles: right for every number of rows and inputs, and a row's bits its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sun.decode import kernels
from sun.decode.packed import Half, Int8, OneDnn, keeps_rows_apart, pack
from sun.decode.tiles import Int8Tiles, Tiles
from sun.decode.vectors import AVX512, VNNI
from sun.model.codes import COARSE, FINE, Codes
from sun.model.quantise import bf16

pytestmark = pytest.mark.skipif(not AVX512, reason="this CPU has no AVX-512, for which tiles are")
UNIT = Codes(COARSE, split=False, smooth=torch.ones(8))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 3), st.booleans(), st.integers(0, 999))
def test_a_layer_of_tiles_is_its_weights_in_float32(rows, inputs, blocks, halves, seed):
    draw = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(64 * blocks, inputs, generator=draw), torch.randn(rows, inputs, generator=draw)
    weight = bf16(weight) if halves else weight
    y = Tiles(weight, halves)(x)
    error = (y - x.double() @ weight.double().T).abs()
    assert y.dtype == torch.float32 and (error <= (x.abs() @ weight.abs().T) * 2e-6).all()


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8"])
def test_a_row_has_the_same_bits_in_any_batch(scheme):
    draw = torch.Generator().manual_seed(0)
    codes = Codes(FINE, split=True) if scheme == "int8" else None
    layer = pack(bf16(torch.randn(128, 576, generator=draw)), scheme, codes, alone=True)
    x = torch.rand(40, 576, generator=draw) * 2 - 1
    expected = layer(x)
    for rows in (*range(1, 20), 32):
        assert torch.equal(layer(x[:rows].contiguous()), expected[:rows]) and torch.equal(layer(x[-rows:].contiguous()), expected[-rows:]), rows


def test_numbers_that_are_none_stay_in_their_row():
    x = torch.ones(8, 16)
    x[3, 5], x[4, 7] = torch.nan, torch.inf
    y = Tiles(torch.ones(64, 16))(x)
    assert y[3].isnan().all() and (y[4] == torch.inf).all() and (y[[0, 1, 2, 5, 6, 7]] == 16).all()


def test_one_thread_has_tiles_where_the_shape_fits_and_several_have_not():
    fits, not_64, not_4 = torch.ones(128, 8), torch.ones(100, 8), torch.ones(64, 6)
    assert isinstance(pack(fits, "fp32", None, alone=True), Tiles) and isinstance(pack(fits, "bf16", None, alone=True), Tiles)
    assert isinstance(pack(fits, "fp32", None), OneDnn) and isinstance(pack(fits, "bf16", None), Half if keeps_rows_apart() else OneDnn)
    assert isinstance(pack(not_64, "fp32", None, alone=True), OneDnn)
    assert isinstance(pack(fits, "int8", UNIT, alone=True), Int8Tiles if VNNI else Int8) and isinstance(pack(fits, "int8", UNIT), Int8)
    assert isinstance(pack(not_4, "int8", Codes(FINE, split=True), alone=True), Int8)


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 8), st.sampled_from([64, 128, 192]), st.integers(0, 999))
def test_sums_of_values_in_registers_are_those_of_the_plain_loop(tokens, group, size, seed):
    draw = np.random.default_rng(seed)
    # As the pool has them: a part of longer arrays.
    shares, values = draw.random((group, tokens + 5), np.float32), draw.standard_normal((tokens + 3, size), np.float32)[2:2 + tokens]
    got, expected = np.empty((group, size), np.float32), shares[:, :tokens].astype(np.float64) @ values
    kernels._sums(shares, values, got)
    np.testing.assert_allclose(got, expected, atol=2e-6 * tokens)
