"""The CUDA executor's kernels, in Triton's interpreter on the CPU, against the reference in plain torch."""

from __future__ import annotations

import pytest
import torch

from ..conftest import DEVICE

pytest.importorskip("triton", reason="needs the triton package; its interpreter needs no GPU")

from sun.decode.cuda.decoder import of_model, reference
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.executor import TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.model.llama import Llama
from sun.model.loading import load_decode
from sun.model.quantise import groups, quantise
from sun_perf.gpu.checks import random_tensors
from sun_perf.gpu.plan import TINY

CONTEXTS = (1, 70, 3)
STEPS = 2


def decoded(base_dir, scheme: str, dtype=torch.float32, rows=tuple(range(len(CONTEXTS))), plain: bool = False) -> torch.Tensor:
    """Logits [STEPS, rows, vocab] of sequences that lie apart in a pool of other numbers."""
    base, model = load_decode(base_dir, reference(scheme))
    pool = KVPool(base.geometry, 100, DEVICE if not plain else "cpu", dtype if not plain else torch.float32, spare=1)
    torch.manual_seed(0)
    pool.data.copy_(torch.randn(*pool.data.shape))
    slots = [pool.take(context + STEPS) for context in CONTEXTS]
    executor = TorchExecutor(model, pool) if plain else CudaExecutor(of_model(model, scheme, dtype, torch.device(DEVICE)), pool, 8)
    return torch.stack([
        executor.step([3 * r + t for r in rows], [CONTEXTS[r] - 1 + t for r in rows], [slots[r] for r in rows]).cpu().clone() for t in range(STEPS)])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_float32_agrees_with_plain_torch(bases, kind):
    torch.testing.assert_close(decoded(bases(kind), "fp32"), decoded(bases(kind), "fp32", plain=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_of_given_states_agree_with_plain_torch(bases, rows):
    base, model = load_decode(bases("qwen3"))
    torch.manual_seed(0)
    hidden = 4 * torch.randn(rows, base.hidden)
    got = CudaExecutor(of_model(model, "fp32", torch.float32, torch.device(DEVICE)), KVPool(base.geometry, 8, DEVICE, spare=1), 8).logits(hidden)
    torch.testing.assert_close(got.cpu(), TorchExecutor(model, KVPool(base.geometry, 8)).logits(hidden), rtol=1e-4, atol=1e-4)


def test_bf16_agrees_with_plain_torch_up_to_its_rounding(bases):
    got, expected = decoded(bases("llama3"), "bf16", torch.bfloat16), decoded(bases("llama3"), "fp32", plain=True)
    assert (got - expected).pow(2).mean().sqrt() < 0.03 * expected.std()


# bf16 has 8 bits for what lies between layers; the reference also rounds int8's inputs.
@pytest.mark.parametrize("scheme, share", [("int8", 0.06), ("int4", 0.03)])
def test_a_low_bit_module_agrees_with_its_reference(scheme, share):
    tensors = random_tensors(TINY)
    ranges = {group[0].removeprefix("model."): torch.rand(tensors[f"{group[0]}.weight"].shape[1]) + 0.5 for group in groups(tensors)}
    model, logits = Llama(TINY, quantise(tensors, scheme, ranges), scheme=scheme), []
    for kind, device, dtype in ((TorchExecutor, "cpu", torch.float32), (None, DEVICE, torch.bfloat16)):
        pool = KVPool(TINY, 40, device, dtype, spare=1)
        executor = kind(model, pool) if kind else CudaExecutor(of_model(model, scheme, dtype, torch.device(device)), pool, 4)
        slots = [pool.take(4) for _ in range(2)]
        logits.append(torch.stack([executor.step([11 + t, 22 + t], [t, t], slots).cpu().clone() for t in range(2)]))
    assert (logits[0] - logits[1]).pow(2).mean().sqrt() < share * logits[0].std()
