"""What only a GPU can show: captured graphs, copies beside a step, and a worker's whole way on the device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from sun.decode.cuda.decoder import of_model
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.executors import formats, load
from sun.decode.kv_pool import KVPool
from sun.model.loading import load_decode

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_replayed_graph_gives_the_bits_of_its_kernels(base_dir, rows):
    base, model = load_decode(base_dir)
    decoder, logits = of_model(model, "bf16", torch.bfloat16, CUDA), []
    for graphs in (True, False):
        pool = KVPool(base.geometry, 200, CUDA, torch.bfloat16, spare=1)
        pool.data.zero_()
        executor = CudaExecutor(decoder, pool, 8, graphs=graphs)
        slots = [pool.take(9) for _ in range(rows)]
        logits.append(torch.stack([executor.step(list(range(rows)), [step] * rows, slots).clone() for step in range(4)]))
    assert torch.equal(*logits)


def test_a_prompts_kv_lies_in_its_slot_and_nowhere_else(base):
    pool = KVPool(base.geometry, 50, CUDA, torch.bfloat16, spare=1)
    pool.data.zero_()
    pool.take(20)
    slot, kv = pool.take(10), torch.randn(base.geometry.layers, 2, base.geometry.kv_heads, 7, base.geometry.head_dim)
    pool.fill(slot, kv)
    assert torch.equal(pool.view(slot, 7).cpu(), kv.bfloat16())
    assert torch.count_nonzero(pool.data) == torch.count_nonzero(kv.bfloat16())


def test_every_format_that_is_said_to_run_takes_a_step(base_dir):
    for scheme, missing in formats("cuda").items():
        if missing is None:
            loaded = load("cuda", base_dir, scheme, kv_tokens=64, max_batch=4, device="cuda:0")
            assert loaded.executor.step([1, 2], [0, 0], [loaded.pool.take(4), loaded.pool.take(4)]).isfinite().all(), scheme
