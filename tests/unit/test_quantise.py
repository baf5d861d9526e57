"""Low-bit schemes: how far a weight may move, and what of a checkpoint is left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.model.codes import COARSE, FINE, Codes, smoothing, symmetric
from sun.model.llama import LINEARS
from sun.model.quantise import FLOAT_INPUTS, NF4, check_scheme, quantise

weights = st.tuples(st.integers(1, 5), st.sampled_from([7, 32, 64, 96, 192]), st.integers(0, 99), st.sampled_from([1e-30, 0.02, 1.0, 1e4]))


def random(rows: int, columns: int, seed: int, scale: float) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


@given(weights)
def test_int8_is_within_half_a_step_of_its_rows_scale(shape):
    weight = random(*shape)
    step = weight.abs().amax(1, keepdim=True) / FINE
    assert ((symmetric(weight, FINE) - weight).abs() <= step * 0.501 + 1e-37).all()


@given(weights)
def test_int4_is_within_half_a_step_of_its_groups_range(shape):
    weight = random(*shape)
    size = 32 if weight.shape[1] % 32 == 0 else weight.shape[1]
    groups = weight.reshape(weight.shape[0], -1, size)
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    error = (FLOAT_INPUTS["int4"](weight).view_as(groups) - groups).abs()
    assert (error <= step * 0.502 + groups.abs().amax() * 1e-6).all()


@given(weights)
def test_nf4_gives_the_nearest_of_its_levels(shape):
    weight = random(*shape)
    size = 64 if weight.shape[1] % 64 == 0 else weight.shape[1]
    blocks = weight.reshape(weight.shape[0], -1, size)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    nearest = ((blocks / scale).unsqueeze(-1) - NF4).abs().amin(-1)
    error = ((FLOAT_INPUTS["nf4"](weight).view_as(blocks) - blocks) / scale).abs()
    torch.testing.assert_close(error, nearest, atol=1e-5, rtol=0)


WEIGHTS = {**FLOAT_INPUTS, "int8": Codes(FINE, True).weight, "smooth int8": Codes(COARSE, False, torch.tensor([0.5, 4.0] * 32)).weight}


@pytest.mark.parametrize("scheme", WEIGHTS)
def test_zeros_stay_zeros_and_a_second_time_changes_nothing(scheme):
    assert not WEIGHTS[scheme](torch.zeros(3, 64)).any()
    once = WEIGHTS[scheme](random(4, 64, 1, 0.05))
    torch.testing.assert_close(WEIGHTS[scheme](once), once, rtol=1e-4, atol=1e-6)


@given(weights, st.booleans())
def test_inputs_are_within_half_a_code_of_their_rows_largest(shape, split):
    x = random(*shape)
    step = x.abs().amax(-1, keepdim=True) / (2 * COARSE * COARSE if split else FINE)
    assert ((Codes(FINE, split).rounded(x) - x).abs() <= step * 0.51 + 1e-30).all()
    assert not Codes(FINE, split).rounded(torch.zeros(2, 8)).any()


def test_smoothing_evens_out_inputs_and_weights_by_powers_of_two():
    ranges, weight = torch.tensor([64.0, 1.0, 1.0, 0.0]), torch.tensor([[1.0, 1.0, -16.0, 0.0]])
    factor = smoothing([weight], ranges)
    assert torch.equal(factor.log2(), factor.log2().round())
    assert factor[0] == 8 * factor[1] == 32 * factor[2]
    assert factor.isfinite().all() and (factor > 0).all()

def test_embedding_norms_and_biases_are_left_alone_and_a_tied_head_becomes_its_own():
    tensors = {"model.embed_tokens.weight": random(9, 32, 0, 1), "model.norm.weight": random(1, 32, 1, 1)[0],
               **{f"model.layers.0.{name}.weight": random(32, 32, 2, 1) for name in LINEARS}, "model.layers.0.self_attn.q_proj.bias": random(1, 32, 3, 1)[0]}
    made = quantise(tensors, "int4")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert made[name] is tensors[name]
    assert not torch.equal(made["model.layers.0.self_attn.q_proj.weight"], tensors["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(made["lm_head.weight"], symmetric(tensors["model.embed_tokens.weight"], FINE))
    assert quantise(tensors, "fp32") is tensors


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(ValueError, match="int3.*fp32, bf16, int8, int4, nf4, bnb-int8, bnb-nf4"):
        check_scheme("int3")
