"""The CUDA executor's kernels, in Triton's interpreter on the CPU, against the reference in plain torch."""

from __future__ import annotations

import pytest
import torch

from ..conftest import DEVICE

pytest.importorskip("triton", reason="needs the triton package; its interpreter needs no GPU")

from sun.decode.cuda.decoder import dummy, of_model, reference
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.executor import TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.model.loading import load_decode

from . import tiny

CONTEXTS = (1, 130, 64)
STEPS = 2


@pytest.fixture(scope="module", params=["llama3", "qwen2", "qwen3"])
def any_base(request, bases):
    return bases(request.param)


def decoded(base_dir, scheme: str, dtype=torch.float32, rows=tuple(range(len(CONTEXTS))), plain: bool = False) -> torch.Tensor:
    """Logits [STEPS, rows, vocab] of sequences that lie apart in a pool of other numbers."""
    base, model = load_decode(base_dir, reference(scheme))
    pool = KVPool(base.geometry, 300, DEVICE if not plain else "cpu", dtype if not plain else torch.float32, spare=1)
    torch.manual_seed(0)
    pool.data.copy_(torch.randn(*pool.data.shape))
    slots = [pool.take(context + STEPS + 3) for context in CONTEXTS]
    executor = TorchExecutor(model, pool) if plain else CudaExecutor(of_model(model, scheme, dtype, torch.device(DEVICE)), pool, 8)
    return torch.stack([
        executor.step([3 * r + t for r in rows], [CONTEXTS[r] - 1 + t for r in rows], [slots[r] for r in rows]).cpu().clone() for t in range(STEPS)])


def test_float32_agrees_with_plain_torch(any_base):
    torch.testing.assert_close(decoded(any_base, "fp32"), decoded(any_base, "fp32", plain=True), rtol=1e-4, atol=1e-4)


def test_bf16_agrees_with_plain_torch_up_to_its_rounding(any_base):
    got, expected = decoded(any_base, "bf16", torch.bfloat16), decoded(any_base, "fp32", plain=True)
    assert (got - expected).pow(2).mean().sqrt() < 0.03 * expected.std()
