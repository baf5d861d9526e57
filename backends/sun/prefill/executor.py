"""One prefill pass. A device, or a runtime, is one implementation of `Executor`."""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.model.llama import Llama
from sun.prefill.device import DeviceModule
from sun.prefill.jobs import Chunk


class Executor(Protocol):
    """Runs tokens of prompts through a task's prefill module.

    continues: whether it can go on behind K and V that are there. If not, it gets whole prompts only: long ones are not cut into
    chunks, and no beginnings are kept. max_tokens: the longest prompt that it runs; 0 is as long as the base's context.
    states: whether it gives the state of a whole prompt's last token, too. device, dtype: of the ``kv`` that it writes to.
    """

    continues: bool
    max_tokens: int
    states: bool
    device: torch.device
    dtype: torch.dtype

    def run(self, chunks: list[Chunk]) -> None:
        """Write K and V of each chunk's tokens, of which there is at least one, to their place in its job's ``kv``; of a chunk that `ends`, set ``hidden``."""


class TorchExecutor:
    """Plain torch: in float32 on the CPU, with weights memory-mapped and shared with every process on the host, or on a GPU. All chunks run as one.

    On a GPU a run returns before it is done: what reads its K and V does so in the same stream, or waits for that.
    """

    continues = True
    max_tokens = 0

    def __init__(self, model: Llama | DeviceModule):
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.states = isinstance(model, Llama) or model.states
        # Of the kernels that take a mask there, or float32, none takes query heads that share a K and V head.
        self.widens = model.device.type == "cuda"

    def run(self, chunks: list[Chunk]) -> None:
        """See `Executor.run`."""
        ids = torch.cat([c.ids for c in chunks]).to(self.device)
        positions = torch.cat([torch.arange(c.job.done, c.until) for c in chunks]).to(self.device)
        sizes = [c.size for c in chunks]

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            for chunk, new_k, new_v in zip(chunks, k.split(sizes), v.split(sizes), strict=True):
                at = slice(chunk.job.done, chunk.until)
                chunk.job.kv[layer, 0, :, at] = new_k.transpose(0, 1)
                chunk.job.kv[layer, 1, :, at] = new_v.transpose(0, 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep(layer, k, v)
            return torch.cat([self._attend(chunk, layer, rows, mask) for chunk, rows, mask in zip(chunks, q.split(sizes), masks, strict=True)])

        masks = [self._mask(c, self.device) for c in chunks]
        x = self.model.fill(ids, positions, attend, keep)
        if ending := [chunk for chunk in chunks if chunk.ends]:
            at = torch.tensor([end - 1 for chunk, end in zip(chunks, accumulate(sizes), strict=True) if chunk.ends], device=self.device)
            last = self.model.geometry.layers - 1

            def look(q: Tensor) -> Tensor:
                return torch.cat([self._attend(chunk, last, row, None) for chunk, row in zip(ending, q.split(1), strict=True)])

            for chunk, state in zip(ending, self.model.end(x[at], positions[at], look), strict=True):
                chunk.job.hidden = state

    def _attend(self, chunk: Chunk, layer: int, q: Tensor, mask: Tensor | None) -> Tensor:
        """q [n, heads, head_dim] over its prompt's K and V up to where the chunk ends -> [n, heads * head_dim]. mask: None if one token sees all, and several are causal."""
        kv = chunk.job.kv[layer, :, :, : chunk.until]
        if self.widens:
            kv = kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)
        keys, values = kv.unbind(0)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask, is_causal=mask is None and len(q) > 1,
            enable_gqa=not self.widens)
        return out.squeeze(0).transpose(0, 1).flatten(1)

    @staticmethod
    def _mask(chunk: Chunk, device: torch.device) -> Tensor | None:
        """A later chunk sees all before it; a first chunk is plainly causal, which needs no mask."""
        if chunk.job.done == 0:
            return None
        return torch.arange(chunk.until, device=device) <= torch.arange(chunk.job.done, chunk.until, device=device).unsqueeze(1)
