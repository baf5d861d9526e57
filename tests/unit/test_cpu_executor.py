"""The compiled decode step against its reference, the same module run plainly in torch."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sun.decode import kernels
from sun.decode.cpu import CpuExecutor
from sun.decode.executor import TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.decode.packed import Half, Int4, Int8, OneDnn, keeps_rows_apart, pack
from sun.decode.tiles import Int8Tiles
from sun.decode.vectors import VNNI
from sun.model.codes import COARSE, FINE, Codes
from sun.model.loading import load_decode
from sun.model.quantise import bf16, int4

from . import tiny

with_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
with_vnni = pytest.mark.skipif(not VNNI, reason="this CPU has no AVX512_VNNI")
HALF = Half if keeps_rows_apart() else OneDnn
BNB = [pytest.param(name, marks=with_bnb) for name in ("bnb-int8", "bnb-nf4")]
CONTEXTS = (1, 7, 30, 64, 2)
STEPS = 4


@pytest.fixture(scope="module", params=tiny.KINDS)
def any_base(request, bases):
    return bases(request.param)


def decoded(base_dir, kind, scheme: str, rows: tuple[int, ...] = tuple(range(len(CONTEXTS))), **options) -> torch.Tensor:
    """Logits [STEPS, rows, vocab] of sequences that lie apart in a pool of other numbers."""
    base, model = load_decode(base_dir, scheme)
    pool = KVPool(base.geometry, 400)
    torch.manual_seed(0)
    pool.data.normal_()
    slots = [pool.take(context + STEPS + 3) for context in CONTEXTS]
    executor = kind(model, pool, **options)
    return torch.stack([
        executor.step([3 * r + t for r in rows], [CONTEXTS[r] - 1 + t for r in rows], [slots[r] for r in rows]) for t in range(STEPS)])


def test_float32_agrees_with_plain_torch_for_every_architecture(any_base):
    torch.testing.assert_close(decoded(any_base, CpuExecutor, "fp32"), decoded(any_base, TorchExecutor, "fp32"), rtol=1e-4, atol=1e-4)


# An input that lies between two codes may fall to either side by the last bit of a sum; what follows from one such step
# is as large as a code. int4 takes its inputs in bf16, which has 8 bits; so does bnb-nf4 where the CPU multiplies bf16,
# and it rounds its weights to them, too.
@pytest.mark.parametrize("scheme, share", [
    ("bf16", 1e-4), ("int8", 0.05), ("int4", 0.02), ("nf4", 1e-3),
    pytest.param("bnb-int8", 0.02, marks=with_bnb), pytest.param("bnb-nf4", 0.04, marks=with_bnb)])
def test_a_low_bit_module_agrees_with_its_reference(any_base, scheme, share):
    got, expected = decoded(any_base, CpuExecutor, scheme), decoded(any_base, TorchExecutor, scheme)
    assert (got - expected).pow(2).mean().sqrt() < share * expected.std()


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8", "int4", "nf4", *BNB])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_gets_the_same_bits_whatever_it_is_batched_with(bases, scheme, threads):
    together = decoded(bases("wide"), CpuExecutor, scheme, threads=threads)
    for rows in ((0,), (1,), (2,), (3,), (4,), (1, 3), (0, 2, 4)):
        assert torch.equal(decoded(bases("wide"), CpuExecutor, scheme, rows, threads=threads), together[:, rows])


@pytest.mark.parametrize("columns", [576, 1536])
@pytest.mark.parametrize("alone", [True, False])
def test_a_row_of_a_layer_of_ordinary_size_has_the_same_bits_in_any_batch(columns, alone):
    """Libraries sum long rows in another order when there are few of them."""
    draw = torch.Generator().manual_seed(0)
    layer, x = pack(torch.randn(960, columns, generator=draw), "fp32", None, alone), torch.randn(40, columns, generator=draw)
    expected = layer(x)
    for rows in (*range(1, 20), 32):
        assert torch.equal(layer(x[:rows].contiguous()), expected[:rows]), rows


def test_a_step_touches_its_sequences_places_and_nothing_else(base_dir):
    base, model = load_decode(base_dir)
    pool = KVPool(base.geometry, 50)
    pool.take(20)
    slot = pool.take(10)
    executor = CpuExecutor(model, pool)
    pool.data.fill_(torch.nan)
    pool.view(slot, 4).normal_()
    before = pool.data.clone()
    assert executor.step([5], [4], [slot]).isfinite().all()
    changed = (pool.data.nan_to_num() != before.nan_to_num()).any(dim=-1).any(dim=0).any(dim=0).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [slot.start + 4]


numbers = st.tuples(st.integers(1, 5), st.integers(0, 999), st.sampled_from([1e-20, 1e-3, 1.0, 300.0]), st.booleans(), st.booleans())


@pytest.mark.parametrize("kind", [Int8, pytest.param(Int8Tiles, marks=with_vnni)])
@settings(deadline=None)
@given(made=numbers)
def test_integer_layers_are_exact_at_the_largest_codes(kind, made):
    """Rows of nothing but the largest magnitudes: the sums that would saturate if the codes were a bit wider."""
    rows, seed, size, split, extreme = made
    draw = torch.Generator().manual_seed(seed)
    codes = Codes(FINE, split=True) if split else Codes(COARSE, split=False, smooth=torch.exp2(torch.randint(-3, 4, (64,), generator=draw)))
    x, raw = (torch.randn(n, 64, generator=draw) * size for n in (rows, 64))
    if extreme:
        x, raw = x.sign() * size, raw.sign() * size
    weight = codes.weight(raw)
    layer = kind(weight, codes)
    scale, given = np.ones(rows, np.float32), np.zeros((rows * (2 if split else 1), 64), np.float32)
    smoothed = x if codes.smooth is None else x / codes.smooth
    for row in range(rows):
        kernels._write(smoothed[row].numpy().copy(), row, rows, layer.form, given, scale)
    y, got, none = layer(torch.from_numpy(given)).numpy(), np.empty((rows, 64), np.float32), np.zeros(64, np.float32)
    for row in range(rows):
        kernels._read(y, row, rows, scale, none, 0, got[row])
    expected = codes.rounded(x).double() @ weight.double().T
    largest = (codes.rounded(x).double().abs() @ weight.double().abs().T).clamp_min(1e-300)
    assert ((torch.from_numpy(got).double() - expected).abs() / largest).max() < 2e-6


@given(st.integers(1, 9), st.integers(0, 999))
def test_int4_layers_stand_for_their_codes_up_to_bf16(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    weight, x = int4(torch.randn(48, 96, generator=draw)), torch.randn(rows, 96, generator=draw)
    error = (Int4(weight)(x) - x @ weight.T).abs()
    assert (error / (x.abs() @ weight.abs().T)).max() < 2**-8


@given(st.integers(1, 9), st.integers(0, 999), st.sampled_from([1e-7, 1e-3, 0.05, 1.0, 9000.0]), st.sampled_from([96, 512, 576, 1100, 1500]))
def test_bf16_layers_are_their_weights_up_to_float32(rows, seed, size, inputs):
    draw = torch.Generator().manual_seed(seed)
    weight, x = bf16(torch.randn(48, inputs, generator=draw) * size), torch.randn(rows, inputs, generator=draw)
    layer = pack(weight, "bf16", None)
    assert isinstance(layer, HALF) and all(torch.equal(layer(x[i : i + 1])[0], layer(x)[i]) for i in range(rows))
    error = (layer(x) - x.double() @ weight.double().T).abs()
    # What float16 cannot hold of a small weight is below 2^-25.
    assert (error <= (x.abs() @ weight.abs().T) * 1e-6 + x.abs().sum(1, keepdim=True) * 2**-25).all()


def test_what_is_asked_of_the_cpu_once_holds_for_other_shapes():
    draw = torch.Generator().manual_seed(1)
    x, layer = torch.randn(5, 96, generator=draw), Half(torch.randn(32, 96, generator=draw), OneDnn)
    assert keeps_rows_apart() == all(torch.equal(layer(row)[0], layer(x)[i]) for i, row in enumerate(x.split(1)))


def test_weights_beyond_float16_stay_float32():
    weight = torch.tensor([[70144.0, 1.0]])
    assert isinstance(pack(weight / 2, "bf16", None), HALF)
    layer = pack(weight, "bf16", None)
    assert isinstance(layer, OneDnn) and layer(torch.ones(1, 2)).item() == 70145


@given(st.floats(-200, 88, width=32))
def test_the_exponential_is_right_to_its_last_places(x):
    assert kernels.exponential(np.float32(x)) == pytest.approx(max(np.exp(np.float64(x)), np.exp(-87.0)), rel=3e-7)


def test_where_compiled_kernels_cannot_be_kept_the_worker_starts_all_the_same(base_dir, monkeypatch):
    base, model = load_decode(base_dir)
    attention, full = kernels.attention, [OSError(28, "No space left on device")] * 2

    def compiled_but_not_kept(*arguments):
        if full:
            raise full.pop()
        return attention(*arguments)

    monkeypatch.setattr(kernels, "attention", compiled_but_not_kept)
    pool = KVPool(base.geometry, 50)
    executor = CpuExecutor(model, pool)
    assert pool.free_tokens == 50 and executor.step([5], [0], [pool.take(4)]).isfinite().all()
    full += [OSError(5, "Input/output error")] * 99
    with pytest.raises(OSError, match="Input/output error"):
        CpuExecutor(model, pool)
