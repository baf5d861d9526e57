"""What only a GPU can show: captured graphs, copies beside a step, and a worker's whole way on the device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from sun.decode.cuda.decoder import of_model
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.executors import formats, load
from sun.decode.kv_pool import KVPool
from sun.handoff.cuda_ipc import CudaIpc
from sun.handoff.inline import Inline
from sun.handoff.kv import verified_kv
from sun.handoff.shm import Shm
from sun.handoff.ticket import TicketError, parse
from sun.handoff.transports import driver
from sun.model.loading import load_decode, load_prefill
from sun.prefill.engine import PrefillEngine

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


def test_a_prompts_kv_reaches_a_pool_on_the_gpu_in_either_format_and_from_either_side(base):
    pool = KVPool(base.geometry, 20, CUDA, torch.bfloat16, spare=1)
    kv = torch.randn(base.geometry.layers, 2, base.geometry.kv_heads, 7, base.geometry.head_dim)
    for sent in (kv, kv.bfloat16(), kv.to(CUDA), kv.bfloat16().to(CUDA)):
        slot = pool.take(7)
        with pool.beside():
            pool.fill(slot, sent)
        assert torch.equal(pool.view(slot, 7).cpu(), kv.bfloat16())
        pool.give_back(slot)


PUBLISHER = """
import sys
from pathlib import Path
from sun.handoff.cuda_ipc import CudaIpc
from sun.handoff.shm import Shm
from sun.handoff.transports import driver
from sun.model.loading import load_prefill
from sun.prefill.engine import PrefillEngine
from sun.prefill.executors import load
base, task, shm = map(Path, sys.argv[1:4])
ipc = CudaIpc(Shm(shm, publisher=True), driver("cuda:0"), 64 << 20)
manifest, module = load(base, task, "cuda", sys.argv[4], "cuda:0")
engine = PrefillEngine(module, manifest, ipc)
for length in (1, 37, 300):
    sys.stdout.buffer.write(engine.submit([7] * length).result()[0] + b"\\n")
sys.stdout.buffer.flush()
sys.stdin.read()
"""


@pytest.mark.parametrize("scheme", ["fp32", "bf16"])
def test_another_process_prefills_and_its_kv_is_read_from_the_gpus_memory(base_dir, repository, tmp_path, scheme):
    task = repository / "prefill_lora" / "1"
    manifest, module = load_prefill(base_dir, task)
    plain = PrefillEngine(module, manifest, Inline())
    process = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(base_dir), str(task), str(tmp_path), scheme], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        reader = CudaIpc(Shm(tmp_path), driver("cuda:0"))
        for length in (1, 37, 300):
            ticket, shipment = parse(process.stdout.readline()), plain.submit([7] * length).result()
            with reader.pull(ticket, []) as buffer, Inline().pull(parse(shipment[0]), shipment) as other:
                got, expected = verified_kv(ticket, buffer), verified_kv(parse(shipment[0]), other)
                assert got.is_cuda and float((got.float().cpu() - expected).norm() / expected.norm()) < (1e-4 if scheme == "fp32" else 0.02)
        process.kill()
        process.wait()
        with pytest.raises(TicketError, match="ticket.location"), reader.pull(ticket, []):
            pass
        reader.close()
    finally:
        process.kill()
        process.communicate()
        plain.close()


def test_every_format_that_is_said_to_run_takes_a_step(base_dir):
    for scheme, missing in formats("cuda").items():
        if missing is None:
            loaded = load("cuda", base_dir, scheme, kv_tokens=64, max_batch=4, device="cuda:0")
            assert loaded.executor.step([1, 2], [0, 0], [loaded.pool.take(4), loaded.pool.take(4)]).isfinite().all(), scheme
