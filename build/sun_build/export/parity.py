"""How far an export's KV is from that of the torch module which serves the task otherwise."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from sun.model.llama import Llama
from sun.prefill.executor import TorchExecutor
from sun.prefill.exported import Parity
from sun.prefill.jobs import Chunk, Job

LENGTHS = (1, 2, 17, 63, 120)
"""Of the prompts that are compared: as one padded batch, and the longest alone."""
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""dtype -> the largest error that an export may have, as a share of the largest |KV|."""


@torch.inference_mode()
def torch_kv(model: Llama, ids: Tensor) -> Tensor:
    """K and V [layers, 2, kv_heads, tokens, head_dim] of token ids [tokens], as the torch executor computes them."""
    geometry = model.geometry
    job = Job(ids, Future(), kv=torch.empty(geometry.layers, 2, geometry.kv_heads, len(ids), geometry.head_dim))
    TorchExecutor(model).run([Chunk(job, len(ids))])
    return job.kv


def compare(compute: Callable[[Tensor], Tensor], model: Llama, runtime: str, max_batch: int,
            max_tokens: int = max(LENGTHS)) -> Parity:
    """Run random prompts of `LENGTHS`, as far as allowed, through ``compute`` (ids [batch, length] -> KV [batch, ...]) and the torch module."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max_tokens, model.base.max_context - 2) for length in LENGTHS]
    prompts = [torch.randint(model.base.vocab, (length,), generator=generator) for length in lengths]
    expected = [torch_kv(model, ids) for ids in prompts]
    worst = 0.0
    for some in (slice(len(prompts) - 1, None), *(slice(i, i + max_batch) for i in range(0, len(prompts), max_batch))):
        rows = prompts[some]
        kv = compute(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        for got, wanted in zip(kv, expected[some], strict=True):
            worst = max(worst, float((got[..., : wanted.shape[-2], :] - wanted).abs().max()))
    return Parity(runtime=runtime, tokens=sum(lengths), max_error=worst, largest=max(float(kv.abs().max()) for kv in expected))


def check(parity: Parity, dtype: str) -> None:
    """Raise RuntimeError if an export of ``dtype`` is further off than it may be."""
    share = parity.max_error / parity.largest
    if not share <= LIMITS[dtype]:
        raise RuntimeError(f"the export's KV differs by {parity.max_error:.3g} from torch's, {share:.2g} of the largest; for {dtype} it may be {LIMITS[dtype]:g}")
