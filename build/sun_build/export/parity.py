"""How far an export is from the torch module which serves the task otherwise."""

from __future__ import annotations

from concurrent.futures import Future

import torch
from torch import Tensor

from sun.model.llama import Llama
from sun.prefill.executor import TorchExecutor
from sun.prefill.exported import Parity
from sun.prefill.jobs import Chunk, Job
from sun.prefill.padded import Compute

LENGTHS = (1, 2, 17, 63, 120)
"""Of the prompts that are compared: as one padded batch, and the longest alone."""
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""dtype -> the largest error that an export may have, as a share of the largest value."""


@torch.inference_mode()
def torch_outputs(model: Llama, ids: Tensor, states: bool = False) -> list[Tensor]:
    """K and V [layers, 2, kv_heads, tokens, head_dim] of token ids [tokens], as the torch executor computes them; with ``states`` that of the last one [hidden], too."""
    geometry = model.geometry
    job = Job(ids, Future(), kv=torch.empty(geometry.layers, 2, geometry.kv_heads, len(ids), geometry.head_dim), whole=states)
    TorchExecutor(model).run([Chunk(job, len(ids))])
    return [job.kv, job.hidden] if states else [job.kv]


def compare(compute: Compute, model: Llama, runtime: str, max_batch: int, max_tokens: int = max(LENGTHS), states: bool = False) -> Parity:
    """Run random prompts of `LENGTHS`, as far as allowed, through ``compute`` and the torch module. states: see `sun.prefill.exported.outputs`."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max_tokens, model.base.max_context - 2) for length in LENGTHS]
    prompts = [torch.randint(model.base.vocab, (length,), generator=generator) for length in lengths]
    expected = [torch_outputs(model, ids, states) for ids in prompts]
    worst = torch.zeros(len(expected[0]))
    for some in (slice(len(prompts) - 1, None), *(slice(i, i + max_batch) for i in range(0, len(prompts), max_batch))):
        rows = prompts[some]
        kv, *rest = compute(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        for i, (ids, wanted) in enumerate(zip(rows, expected[some], strict=True)):
            got = [kv[i][..., : len(ids), :], *(each[i, len(ids) - 1] for each in rest)]
            # Python's max() would pass over a NaN, which an overflow in float16 makes; torch's keep it.
            worst = torch.maximum(worst, torch.stack([(a - b).abs().max() for a, b in zip(got, wanted, strict=True)]))
    largest = torch.tensor([[each.abs().max() for each in outputs] for outputs in expected]).amax(dim=0)
    of = int((worst / largest).argmax())
    return Parity(runtime=runtime, tokens=sum(lengths), max_error=float(worst[of]), largest=float(largest[of]))


def check(parity: Parity, dtype: str) -> None:
    """Raise RuntimeError if an export of ``dtype`` is further off than it may be."""
    share = parity.max_error / parity.largest
    if not share <= LIMITS[dtype]:
        raise RuntimeError(f"the export differs by {parity.max_error:.3g} from torch's, {share:.2g} of the largest; for {dtype} it may be {LIMITS[dtype]:g}")
